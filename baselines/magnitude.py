"""Magnitude pruning: the neurons with the smallest weights go first [Li et al., arXiv 1608.08710]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from baselines.layerwise import LayerwisePruner
from kfac_flat.pruning import layers


class MagnitudePruner(LayerwisePruner):
    """Score a group of neurons by the norm of the weights that produce it; all else is as in NeuronPruner.

    Weights of layers differ in scale, so each neuron's norm is taken relative to the mean norm in its layer; a group
    that ties several neurons scores their sum, which the budget divides by their number.

    Args:
        arguments: As of NeuronPruner.
        order: Of the norm: 1 for the sum of absolute weights, as in the paper, 2 for the Euclidean norm.
        options: As of NeuronPruner.

    Raises:
        ValueError: if ``order`` is neither 1 nor 2; besides, as NeuronPruner does.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = MagnitudePruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, every=1, events=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    def __init__(self, *arguments: Any, order: int = 2, **options: Any) -> None:
        if order not in (1, 2):
            raise ValueError(f"order={order!r} must be 1 or 2")
        self._order = order
        super().__init__(*arguments, **options)

    def _layer_scores(self) -> dict[str, Tensor]:
        return {n: relative_norms(self._model.get_submodule(n), self._order) for n in self._graph.hidden}


def relative_norms(module: nn.Module, order: int) -> Tensor:
    """Norm of the weights of each output channel, ``[C_out]`` on the CPU, relative to their mean."""
    weight = layers.weight_of(module).detach().cpu().float()
    per_output = weight.transpose(0, 1) if isinstance(module, layers.TRANSPOSED) else weight
    norms: Tensor = torch.linalg.vector_norm(per_output.flatten(1), order, dim=1)
    return norms / norms.mean().clamp(min=torch.finfo(norms.dtype).tiny)
