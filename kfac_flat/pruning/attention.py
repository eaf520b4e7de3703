"""Multi-head attention that has lost heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FewerHeadsAttention(nn.MultiheadAttention):
    """What :class:`torch.nn.MultiheadAttention` becomes when heads, or features it reads or writes, are removed.

    torch's own forward takes the number of heads times their size for the width of the input. Here heads keep their
    size, and with it the scale ``1 / sqrt(head_dim)``, while their number is whatever the weights say. A module is
    turned into this class in place: parameters, hooks and names stay. Arguments and results are those of torch, but for
    masks that differ from head to head.

    Example:
        >>> attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> before = attention(x, x, x)[0]
        >>> attention.__class__ = FewerHeadsAttention
        >>> torch.allclose(attention(x, x, x)[0], before, atol=1e-6)
        True
    """

    head_dim: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see :meth:`torch.nn.MultiheadAttention.forward`.

        Raises:
            RuntimeError: if ``is_causal``, no more than a hint at what ``attn_mask`` is, comes without one.
            ValueError: if ``attn_mask`` differs from head to head.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True only says what attn_mask is: give that, too")
        batched = query.dim() == 3
        sequences = [t if batched else t.unsqueeze(0) for t in (query, key, value)]
        if batched and not self.batch_first:
            sequences = [t.transpose(0, 1) for t in sequences]
        q, k, v = self._projected(*sequences)
        mask = self._mask(key_padding_mask, attn_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout(F.softmax(logits if mask is None else logits + mask, -1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, *sequences: Tensor) -> list[Tensor]:
        """Project query, key and value ``[N, T, E]`` to ``[N, heads, T, head_dim]`` each."""
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        projected = [F.linear(t, w, b) for t, w, b in zip(sequences, weights, biases, strict=True)]
        return [t.reshape(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in projected]

    @staticmethod
    def _mask(padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Add up the masks ``[N, S]`` and ``[T, S]``; where a boolean one is true, nothing is attended to."""
        if mask is not None and mask.dim() > 2:
            raise ValueError("attention that has lost heads takes no attn_mask that differs from head to head")
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        total = None
        for part in (padding, mask):
            if part is not None:
                if part.dtype == torch.bool:
                    part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -torch.inf)
                total = part if total is None else total + part
        return total
