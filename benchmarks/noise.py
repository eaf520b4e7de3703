"""What becomes of a network when its weights are disturbed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def disturbed(model: nn.Module, noise: float, draws: int) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of the layers by name, each multiplied by 1 plus normal noise, as often as it is drawn.

    Such noise is the same for weights that are scaled without a change of the function, such as those in front of a
    ReLU against those behind it. It is always the same noise for the same network.

    Args:
        model: Not changed.
        noise: Its standard deviation.
        draws: Number of times it is drawn.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    generator = torch.Generator(next(iter(weights.values())).device).manual_seed(0)
    for _ in range(draws):
        yield {
            name: w * (1 + noise * torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype))
            for name, w in weights.items()
        }
