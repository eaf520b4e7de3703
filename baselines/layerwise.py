"""Pruners that score the neurons of each layer by itself, and those that go together by the sum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_flat import NeuronPruner
from kfac_flat.pruning.saliency import places


class LayerwisePruner(NeuronPruner, ABC):
    """Choose neurons by scores of each layer's own; all else is as in NeuronPruner.

    A group that ties several neurons scores their sum, which the budget divides by their number. Neurons of a layer
    without scores stay.
    """

    @abstractmethod
    def _layer_scores(self) -> Mapping[str, Tensor]:
        """Score the output channels of hidden layers, ``[C_out]`` each, by name."""

    def _scores(self) -> list[float]:
        ids, scores = self._groups.ids, self._layer_scores()
        total = torch.zeros(len(ids) + 1, dtype=torch.float64)
        for name in self._graph.hidden:
            groups = self._channels[name].outputs
            own = scores[name].cpu().double() if name in scores else torch.full([len(groups)], math.inf).double()
            total.index_add_(0, places(ids, groups), own)
        result: list[float] = total[:-1].tolist()
        return result
