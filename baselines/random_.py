"""Random pruning: neurons go in an order drawn beforehand, which shows what the other methods' scores are worth."""

from __future__ import annotations

from typing import Any

import torch

from kfac_flat import NeuronPruner


class RandomPruner(NeuronPruner):
    """Give every group of neurons a random number, once and for all; all else is as in NeuronPruner.

    A group that ties several neurons has as good a chance to go as any other.

    Args:
        arguments: As of NeuronPruner.
        seed: Of the numbers. torch's global generators are never touched.
        options: As of NeuronPruner.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = RandomPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, every=1, events=1, seed=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    def __init__(self, *arguments: Any, seed: int = 0, **options: Any) -> None:
        self._seed = seed
        super().__init__(*arguments, **options)

    def _scores(self) -> list[float]:
        generator = torch.Generator().manual_seed(self._seed)
        numbers = torch.rand(1 + max(int(c.outputs.max()) for c in self._graph.channels.values()), generator=generator)
        return (numbers[self._groups.ids] * self._groups.neurons).tolist()
