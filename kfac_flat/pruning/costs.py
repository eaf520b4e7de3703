"""What parameters and multiply-accumulates would be left without some neurons, without building that model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfac_flat.pruning import layers
from kfac_flat.pruning.graph import Channels
from kfac_flat.pruning.ids import membership


class Costs:
    """Sizes of all layers as products of their widths.

    Products of activations with each other, as in attention, are not among them: what these save comes on top.

    Args:
        model: The model as it is.
        channels: The groups of its channels, by module.
        positions: How often each module's weight is applied for one example, by name.
    """

    def __init__(self, model: nn.Module, channels: Mapping[str, Channels], positions: Mapping[str, float]) -> None:
        modules = {name: part for name in channels if isinstance(part := layers.part(model, name), nn.Module)}
        seen: set[nn.Parameter] = set()
        weights, others, square = [], [], []
        for module in modules.values():
            own = {p for p in module._parameters.values() if p is not None} - seen
            seen |= own
            both = layers.is_producer(module) and not layers.is_depthwise(module)
            weight = {layers.weight_of(module)} & own if both else set()
            weights.append(sum(p.numel() for p in weight))
            others.append(sum(p.numel() for p in own - weight))
            square.append(layers.weight_of(module).numel() if layers.is_producer(module) else 0)
        self._weights, self._others = (torch.tensor(v, dtype=torch.float64) for v in (weights, others))
        applied = torch.tensor([positions.get(name, 0) for name in modules], dtype=torch.float64)
        self._macs = torch.tensor(square, dtype=torch.float64) * applied
        self._reads_all = torch.tensor([not layers.is_depthwise(m) for m in modules.values()])
        self._inputs = _Places([channels[name].inputs for name in modules])
        self._outputs = _Places([channels[name].outputs for name in modules])

    def saved(self, gone: Tensor) -> tuple[float, float]:
        """Parameters and multiply-accumulates that go with these groups."""
        inputs, outputs = (1 - places.shares(gone) for places in (self._inputs, self._outputs))
        read = torch.where(self._reads_all, inputs, 1.0)
        parameters = self._weights * (1 - read * outputs) + self._others * (1 - outputs)
        return float(parameters.sum().round()), float((self._macs * (1 - read * outputs)).sum().round())

    def of_each(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters and multiply-accumulates that each group costs, those that two share counted for both.

        Returns:
            Two tensors ``[groups]``, float64.
        """
        read = torch.where(self._reads_all, 1.0, 0.0)
        parameters = self._outputs.spread(self._weights + self._others, ids) + self._inputs.spread(
            self._weights * read, ids
        )
        macs = self._outputs.spread(self._macs, ids) + self._inputs.spread(self._macs * read, ids)
        return parameters, macs


class _Places:
    """The groups of one side of all layers, one after the other."""

    def __init__(self, ids: list[Tensor]) -> None:
        self._ids = torch.cat(ids)
        self._counts = torch.tensor([len(i) for i in ids])
        self._layers = torch.repeat_interleave(torch.arange(len(ids)), self._counts)
        self._size = int(self._ids.max()) + 1

    def shares(self, gone: Tensor) -> Tensor:
        """Share of each layer's channels that goes, ``[layers]``, float64."""
        lost = membership(gone[gone < self._size], self._size)[self._ids].to(torch.float64)
        return torch.zeros(len(self._counts), dtype=torch.float64).index_add(0, self._layers, lost) / self._counts

    def spread(self, costs: Tensor, ids: Tensor) -> Tensor:
        """Divide what each layer costs among its channels and sum up by group, ``[groups]``."""
        each = (costs / self._counts)[self._layers]
        total = torch.zeros(self._size, dtype=torch.float64).index_add(0, self._ids, each)
        return torch.where(ids < self._size, total[ids.clamp(max=self._size - 1)], 0.0)
