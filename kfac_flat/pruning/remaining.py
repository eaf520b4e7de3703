"""What is left of a model, and what it would be without some more of its neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kfac_flat.pruning import layers
from kfac_flat.pruning.budget import Options
from kfac_flat.pruning.costs import Costs
from kfac_flat.pruning.graph import Channels, NeuronGraph, kept_without, without
from kfac_flat.pruning.groups import Groups
from kfac_flat.pruning.latency import latency
from kfac_flat.pruning.report import Size
from kfac_flat.pruning.surgery import Surgery
from kfac_flat.structure import structural_copy

NONE = torch.tensor([], dtype=torch.long)


@dataclass(frozen=True)
class Remaining:
    """The channels that are left, how they are grouped, and how large the model is with them.

    Attributes:
        model: The model, as wide as this says until it is cut.
        graph: How its neurons hang together.
        options: What its size is measured in, and how neurons compete.
        channels: The groups of every module's channels, by name.
        kept: Positions of the channels in the dense module, inputs and outputs, by name.
        groups: The groups that can go.
        dense: The groups that could go before any went.
        size: The model's size.
    """

    model: nn.Module
    graph: NeuronGraph
    options: Options
    channels: dict[str, Channels]
    kept: dict[str, tuple[Tensor, Tensor]]
    groups: Groups
    dense: Groups
    size: Size

    @classmethod
    def everything(cls, model: nn.Module, graph: NeuronGraph, options: Options) -> Remaining:
        """Nothing has gone yet."""
        kept = {n: (torch.arange(len(c.inputs)), torch.arange(len(c.outputs))) for n, c in graph.channels.items()}
        neurons = sum(len(graph.channels[name].outputs) for name in graph.hidden)
        size = Size(neurons, sum(p.numel() for p in model.parameters()), graph.macs)
        groups = _groups(graph, graph.channels)
        dense = cls(model, graph, options, graph.channels, kept, groups, groups, size)
        return replace(dense, size=replace(size, latency=dense._latency(NONE))) if options.times else dense

    def removal(self, gone: Tensor) -> Removal:
        """Prove on a skeleton that the model can do without these groups, and return what is left then.

        Raises:
            CutError: if it cannot.
        """
        return Removal(gone, self._without(gone, self._measure(gone)))

    def _without(self, gone: Tensor, size: Size) -> Remaining:
        positions = dict(self.kept)
        for name, keep in kept_without(self.channels, gone).items():
            inputs, outputs = positions[name]
            positions[name] = inputs[keep.inputs], outputs[keep.outputs]
        channels = without(self.channels, gone)
        return replace(self, channels=channels, kept=positions, groups=_groups(self.graph, channels), size=size)

    def fits(self) -> bool:
        """Tell whether the model's layers are as wide as they should be."""
        return all(
            layers.channel_counts(layers.part(self.model, name)) == (len(c.inputs), len(c.outputs))
            for name, c in self.channels.items()
        )

    def widths(self) -> dict[str, int]:
        """Output channels of each producer."""
        return {name: len(self.channels[name].outputs) for name in self.graph.producers}

    def _measure(self, gone: Tensor) -> Size:
        size = self.graph.measure(self.model, self.channels, gone)
        return replace(size, latency=self._latency(gone)) if self.options.times else size

    def fewest(self, scores: Sequence[float], goal: float, options: Options) -> Tensor:
        """Return as few groups as bring the budget down to the goal; all that the floors allow if they do not."""
        costs, ranking = Costs(self.model, self.channels, self.graph.positions), options.ranking
        effects = torch.tensor(scores, dtype=torch.float64)
        if ranking.normalize is not None:
            effects = self.groups.normalised(effects, ranking.normalize)
        parameters, macs = costs.of_each(self.groups.ids)
        each = {"neuron": self.groups.neurons.double(), "parameter": parameters, "mac": macs}
        order = self.groups.order(
            *(effects, each.get(ranking.per, torch.ones_like(effects))),
            floors=options.floors(self.groups.widths, self.dense.widths),
            round_to=options.round_to,
            alike=self.dense if ranking.scope == "layer" else None,
        )
        return order.fewest(lambda gone: self._amount_without(gone, costs) <= goal)

    def amount_without(self, gone: Tensor) -> float:
        """What the model would be without these groups, in terms of the budget and without building it."""
        return self._amount_without(gone, Costs(self.model, self.channels, self.graph.positions))

    def _amount_without(self, gone: Tensor, costs: Costs) -> float:
        if self.options.times:
            return self._latency(gone)
        if self.options.budget == "neurons":
            return self.size.neurons - self.groups.neurons_of(gone)
        parameters, macs = costs.saved(gone)
        return self.options.amount(self.size) - (parameters if self.options.budget == "parameters" else macs)

    def _latency(self, gone: Tensor) -> float:
        """Cut a copy of the model and return how long it takes."""
        small = structural_copy(self.model, lambda t: t.detach().clone())
        Surgery(small, kept_without(self.channels, gone)).apply()
        return latency(small, self.graph.inputs)


@dataclass(frozen=True)
class Removal:
    """Groups that go, and what is left without them."""

    gone: Tensor
    left: Remaining


def _groups(graph: NeuronGraph, channels: dict[str, Channels]) -> Groups:
    return Groups.of({name: channels[name].outputs for name in graph.hidden})
