"""A BackPACK first-order extension that reads what the Kronecker factors are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension
from torch import Tensor, nn

from kfac_flat.curvature.radius import LayerData

# BackPACK leaves what a rule returns on the weight, which twin and model share. So the data are put on the twin's
# module instead, and nothing remains on the weight but the name, which is taken off again at once.
_SAVEFIELD = "_kfac_flat_layer_data"


class _ReadWeight(FirstOrderModuleExtension):  # type: ignore[misc]  # BackPACK is untyped
    """Take the layer's input and output gradient when the backward pass comes by."""

    def __init__(self) -> None:
        super().__init__(params=["weight"])

    def weight(
        self, ext: LayerDataExtension, module: Any, g_inp: tuple[Tensor], g_out: tuple[Tensor], bpQuantities: None
    ) -> None:
        vars(module)[_SAVEFIELD] = LayerData(module, module.input0, g_out[0]).to_working_precision()


class LayerDataExtension(FirstOrderBackpropExtension):  # type: ignore[misc]  # BackPACK is untyped
    """Collects :class:`LayerData` from layers of the given classes during one backward pass.

    With ``create_graph=True`` in that pass, the data carry a graph and may be differentiated again.
    """

    def __init__(self, kinds: Iterable[type[nn.Module]]) -> None:
        super().__init__(savefield=_SAVEFIELD, fail_mode="SILENT", module_exts={kind: _ReadWeight() for kind in kinds})

    @staticmethod
    def collect(layer: nn.Module) -> LayerData | None:
        """Return what was read of the layer, if the backward pass came by, and leave no trace."""
        weight = getattr(layer, "weight", None)  # a projection that has not been called yet has none
        if weight is not None:
            vars(weight).pop(_SAVEFIELD, None)
        data: LayerData | None = vars(layer).pop(_SAVEFIELD, None)
        return data
