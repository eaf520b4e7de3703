"""Choosing groups as an event does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_flat.pruning.groups import Groups


def cheapest(groups: Groups, scores: Sequence[float], count: int, floor: int = 1, round_to: int = 1) -> Tensor:
    """Choose groups, smallest score per neuron first, until so many neurons are gone; ids, ascending."""
    floors = dict.fromkeys(groups.widths, floor)
    worth = torch.tensor(scores, dtype=torch.float64)
    order = groups.order(worth, groups.neurons.double(), floors=floors, round_to=round_to)
    return order.fewest(lambda gone: groups.neurons_of(gone) >= count)
