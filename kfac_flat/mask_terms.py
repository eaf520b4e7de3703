"""The penalty's gradient at masks on layers' inputs: what the penalty says of each neuron that is read.

A mask on an input of a layer changes rho in two ways: through the weights that read it, as it does the loss, and
through the layer's own factor A [HGNP eq. 5-6]. Both are kept for the steps until the penalty is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kfac_flat.curvature.twin import layer_shape, weight_of
from kfac_flat.pruning.layers import channel_counts
from kfac_flat.structure import Kept

Terms = Mapping[str, Tensor]


@dataclass(frozen=True)
class MaskTerms:
    """Gradient of one step's penalty at masks on layers' inputs, ``[C_in]`` each, by the layers' names.

    Attributes:
        direct: Through A alone.
        through_weights: Through the weights that read the inputs; under one name where layers share a weight.
    """

    direct: Terms = field(default_factory=dict)
    through_weights: Terms = field(default_factory=dict)

    def by_weight(self, model: nn.Module, times_direct: int, times_weights: int) -> dict[nn.Parameter, Tensor]:
        """Add up both parts, each so many times, by the weight that layers hold and may share."""
        total: dict[nn.Parameter, Tensor] = {}
        for times, terms in ((times_direct, self.direct), (times_weights, self.through_weights)):
            for name, term in terms.items() if times else ():
                weight = weight_of(model, name)
                if weight is not None:
                    total[weight] = times * term + total.get(weight, 0.0)
        return total

    def fits(self, model: nn.Module) -> bool:
        """Tell whether the model has these layers, with as many inputs."""

        def has_inputs(name: str, count: int) -> bool:
            try:
                return channel_counts(layer_shape(model, name))[0] == count
            except (AttributeError, TypeError):  # nothing of this name, or something without channels
                return False

        return all(has_inputs(name, len(term)) for part in self._parts for name, term in part.items())

    def index_select(self, kept: Mapping[str, Kept]) -> MaskTerms:
        """Return what a cut leaves of them; until computed anew they count what read the inputs before it."""
        return self._changed(lambda name, t: t.index_select(0, kept[name].inputs.to(t.device)) if name in kept else t)

    def joined_to(self, left: MaskTerms, kept: Mapping[str, Kept]) -> MaskTerms | None:
        """Return what ``left`` becomes when the channels that a cut took come back; None where they are not known."""
        pairs = list(zip(left._parts, self._parts, strict=True))
        if any(part.keys() - whole.keys() for part, whole in pairs):
            return None
        joined = (
            {n: whole[n].index_copy(0, kept[n].inputs.to(t.device), t) if n in kept else t for n, t in part.items()}
            for part, whole in pairs
        )
        return MaskTerms(*joined)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Plain tensors by names."""
        return {"mask_terms": dict(self.direct), "weight_terms": dict(self.through_weights)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> MaskTerms:
        """Return copies of what :meth:`state_dict` gave."""
        return cls(state["mask_terms"], state["weight_terms"])._changed(lambda _, t: t.to(device, copy=True))

    @property
    def _parts(self) -> tuple[Terms, Terms]:
        return self.direct, self.through_weights

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> MaskTerms:
        return MaskTerms(*({name: change(name, term) for name, term in part.items()} for part in self._parts))
