"""Multi-head attention: with heads removed, and with its projections as layers that can be looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat.structure import Kept

PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # of query, key and value, in the order of in_proj_weight's rows


class FewerHeadsAttention(nn.MultiheadAttention):
    """What :class:`torch.nn.MultiheadAttention` becomes when heads, or features it reads or writes, are removed.

    torch's own forward takes the number of heads times their size for the width of the input. Here heads keep their
    size, and with it the scale ``1 / sqrt(head_dim)``, while their number is whatever the weights say. A module is
    turned into this class in place: parameters, hooks and names stay. Arguments and results are those of torch; a mask
    that differs from head to head has one part for each head that is left.

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
            ValueError: if ``attn_mask`` is for another number of heads.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True only says what attn_mask is: give that, too")
        batched = query.dim() == 3
        sequences = [t if batched else t.unsqueeze(0) for t in (query, key, value)]
        if batched and not self.batch_first:
            sequences = [t.transpose(0, 1) for t in sequences]
        q, k, v = (self._heads(t) for t in self._projected(*sequences))
        mask = self._mask(key_padding_mask, attn_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            appended = [self._heads(b).expand(len(k), -1, -1, -1) for b in (self.bias_k, self.bias_v)]
            k, v = (torch.cat(both, 2) for both in zip((k, v), appended, strict=True))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))  # what has been appended is always attended to
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout(F.softmax(logits if mask is None else logits + mask, -1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self._joined(heads)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _projected(self, *sequences: Tensor) -> list[Tensor]:
        """Project query, key and value, ``[N, T, features]`` each, to ``[N, T, heads * head_dim]``."""
        return [F.linear(t, w, b) for t, (w, b) in zip(sequences, projection_weights(self), strict=True)]

    def _heads(self, projected: Tensor) -> Tensor:
        """View ``[N, T, heads * head_dim]`` as ``[N, heads, T, head_dim]``."""
        return projected.reshape(*projected.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _joined(self, heads: Tensor) -> Tensor:
        """Project all heads, ``[N, heads, T, head_dim]``, to ``[T, N, features]``.

        Time comes first in memory, as in torch: dropout behind it draws in the order of memory.
        """
        out: Tensor = self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))
        return out

    @staticmethod
    def _mask(padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Add up masks ``[N, S]`` and ``[T, S]`` or ``[N * heads, T, S]``; boolean ones are true where not to look."""
        if mask is not None and mask.dim() > 2:
            if len(mask) != q.shape[0] * q.shape[1]:
                raise ValueError(
                    f"attn_mask is for {len(mask)} heads in the whole batch, but {q.shape[0]} examples with "
                    f"{q.shape[1]} heads each are left: give a mask for those, or one for all heads"
                )
            mask = mask.reshape(*q.shape[:2], *mask.shape[1:])
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        total = None
        for part in (padding, mask):
            if part is not None:
                if part.dtype == torch.bool:
                    part = torch.zeros_like(part, dtype=q.dtype).masked_fill(part, -torch.inf)
                total = part if total is None else total + part
        return total


class ProjectingAttention(FewerHeadsAttention):
    """Attention that calls a Linear for each of its projections, so that their inputs and outputs can be read.

    It is made from another one in place by :func:`call_projections`; its parameters stay where they are.
    """

    def _projected(self, *sequences: Tensor) -> list[Tensor]:
        projected: list[Tensor] = []
        for name, t, (weight, bias) in zip(PROJECTIONS, sequences, projection_weights(self), strict=True):
            layer = self.get_submodule(name)
            vars(layer).update(weight=weight, bias=bias)  # parts of what the optimizer changes in place
            projected.append(layer(t))
        return projected

    def _joined(self, heads: Tensor) -> Tensor:
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))  # layers are read with examples first
        return out.transpose(0, 1).contiguous()


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Tell whether the module computes what torch's multi-head attention does, with or without all of its heads."""
    forwards = (nn.MultiheadAttention.forward, FewerHeadsAttention.forward)
    return isinstance(module, nn.MultiheadAttention) and type(module).forward in forwards


def projection_parameters(attention: nn.MultiheadAttention) -> list[nn.Parameter]:
    """Return the parameter that holds the weight of each projection; one matrix may hold all three."""
    packed = attention.in_proj_weight
    if packed is not None:
        return [packed] * 3
    return [getattr(attention, f"{name}_weight") for name in PROJECTIONS]


def projection_weights(attention: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each projection, ``[heads * head_dim, features]`` and ``[heads * head_dim]``."""
    packed, bias = attention.in_proj_weight, attention.in_proj_bias
    weights = projection_parameters(attention) if packed is None else packed.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return list(zip(weights, biases, strict=True))


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Describe the projections of query, key and value as layers of the right size that hold no numbers.

    Each is a layer of its own, as though it had been written as one: query and key may come from different places, and
    which block of the curvature a weight belongs to should not depend on who calls.
    """
    shapes = [weight.shape for weight, _ in projection_weights(attention)]
    layers = (nn.Linear(width, rows, bias=False, device="meta") for rows, width in shapes)
    return dict(zip(PROJECTIONS, layers, strict=True))


def call_projections(attention: nn.MultiheadAttention) -> None:
    """Turn attention, in place, into one that calls :func:`projections` as its submodules."""
    for name, layer in projections(attention).items():
        del layer.weight, layer.bias
        attention.add_module(name, layer)
    kind = type(attention)
    attention.__class__ = type(kind.__name__, (ProjectingAttention, kind), {})


def kept_by_projections(model: nn.Module, kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """Say of every attention module that loses channels what its projections keep, by name, along with all else."""
    whole = dict(kept)
    for name, module in model.named_modules():
        if name in kept and isinstance(module, nn.MultiheadAttention):
            rows = module.in_proj_weight.shape[0] // 3
            for i, projection in enumerate(PROJECTIONS):
                outputs = kept[name].outputs
                own = outputs[(outputs >= i * rows) & (outputs < (i + 1) * rows)] - i * rows
                whole[f"{name}.{projection}"] = Kept(kept[name].inputs, own)
    return whole
