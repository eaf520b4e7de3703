"""APoZ: neurons whose output is most often zero go first [Hu et al., arXiv 1607.03250]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from baselines.reading import FeatureMapPruner, FeatureMaps


class NonZeros(FeatureMaps):
    """Share of the entries that layers read of each group which are not zero, over all passes since the last removal.

    ``total`` counts these entries and ``steps`` all of them, by group: exactly so up to 2**24 zeros or non-zeros.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.total, self.steps = self.total.double(), torch.zeros_like(self.total, dtype=torch.float64)

    def record(self, direct: Mapping[Any, Tensor], scale: Tensor | None = None) -> None:
        """Do nothing: gradients tell nothing of zeros."""

    @torch.no_grad()
    def look(self, name: str, x: Tensor, axis: int) -> None:
        """Count."""
        others = [i for i in range(x.dim()) if i != axis]
        found = torch.count_nonzero(x.detach(), others)
        entries = torch.full_like(found, x.numel() // x.shape[axis])
        for sums, counts in ((self.total, found), (self.steps, entries)):
            padded = sums.new_zeros(len(sums) + 1).index_add_(0, self._slots[name], counts.to(sums.dtype))
            sums += padded[:-1]
        self._without_gradient.discard(name)


class APoZPruner(FeatureMapPruner):
    """Score a group of neurons by how often its output is not zero, one minus its average percentage of zeros.

    Counted where layers read it, in the forward passes of the training: after activations, and after pooling where
    there is any in between, while the paper counts right after the ReLU. A network without ReLU has no zeros to count.

    Args:
        arguments: As of NeuronPruner.
        options: As of NeuronPruner.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = APoZPruner(model, optimizer, torch.randn(1, 4), target=0.25, start=1, every=1, events=1)
        >>> _ = model[0].bias.data.fill_(100.0).index_fill_(0, torch.tensor([2, 5]), -100.0)  # these are never active
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> pruner.step().removed
        {'0': tensor([2, 5])}
    """

    _criterion = NonZeros

    def _scores(self) -> list[float] | None:
        shares = super()._scores()
        if shares is None:
            return None
        return (torch.tensor(shares) * self._groups.neurons).tolist()  # per neuron, a group counts as any other
