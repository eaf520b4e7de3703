"""What could be pruned of a model, found out before any training."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kfac_flat.pruning import layers
from kfac_flat.pruning.budget import Options, Ranking
from kfac_flat.pruning.graph import NeuronGraph, kept_without
from kfac_flat.pruning.remaining import Remaining
from kfac_flat.pruning.report import Size
from kfac_flat.pruning.surgery import Surgery
from kfac_flat.pruning.text import aligned, by_reason, percent, shortened
from kfac_flat.pruning.tracing import skeleton
from kfac_flat.structure import unwrap

COLUMNS = ("layer", "in", "out", "can go", "parameters", "MACs", "type")
_KIND = 18  # characters of a class's name


@dataclass(frozen=True)
class Layer:
    """A layer whose outputs are neurons.

    Attributes:
        kind: Its class.
        inputs: Input channels.
        outputs: Output channels.
        removable: How many of these can go.
        parameters: Number of its own parameters.
        macs: Multiply-accumulates of its weight for one example in eval mode; None if it is not called by itself.
    """

    kind: str
    inputs: int
    outputs: int
    removable: int
    parameters: int
    macs: int | None

    @property
    def cells(self) -> list[str]:
        """What stands in a table, in the order of :data:`COLUMNS`."""
        numbers = (self.inputs, self.outputs, self.removable, self.parameters, self.macs)
        return [*("-" if number is None else f"{number:,}" for number in numbers), shortened(self.kind, _KIND)]


@dataclass(frozen=True)
class Tied:
    """Groups of channels that go together, all made up alike.

    Attributes:
        groups: How many there are.
        members: How many channels of which layer each of them has, by name.
    """

    groups: int
    members: dict[str, int]

    def names(self) -> list[str]:
        """Write the layers, with the number of channels where a group has several."""
        return [name if number == 1 else f"{number} of {name}" for name, number in self.members.items()]


@dataclass(frozen=True)
class EvenCut:
    """What a model would be if all layers that can lost about the same share of their neurons.

    Attributes:
        target: Share of the model's neurons that was asked for.
        widths: Output channels of each layer, by name.
        size: Size of the model.
    """

    target: float
    widths: dict[str, int]
    size: Size


@dataclass(frozen=True)
class Inspection:
    """What could be pruned of a model.

    Attributes:
        layers: All Linear layers, convolutions and attentions, by name.
        tied: Which channels go together.
        size: Size of the model.
        least: Its size if all went that can, but one neuron of each layer or group.
        reached: How many of the parameters are in tensors which lose entries then.
        frozen: Layers with neurons that cannot go, by name, and why.
        even: What it would be with a share of the neurons gone, if that was asked for.
    """

    layers: dict[str, Layer]
    tied: list[Tied]
    size: Size
    least: Size
    reached: int
    frozen: dict[str, str]
    even: EvenCut | None

    def table(self, width: int = 100) -> str:
        """Lay everything out as plain text, in lines of at most this many characters where names allow."""
        parts = [
            aligned([self.columns, *self.rows()], width),
            aligned([("", *self.states), *self.sizes()], width),
            [self.reach],
            ["Channels that go together, and how often:", *_listed(self._tied_lines(), width)],
            ["Frozen:", *_listed(self._frozen_lines(), width)] if self.frozen else [],
        ]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    @property
    def reach(self) -> str:
        """How much of the model can be pruned, in a sentence."""
        share = percent(self.reached, self.size.parameters)
        return f"{share} of the parameters are in tensors that can shrink."

    @property
    def columns(self) -> list[str]:
        """Titles of :meth:`rows`."""
        return [*COLUMNS, *([f"at {self.even.target:.0%}"] if self.even else [])]

    def rows(self) -> list[list[str]]:
        """Return the layers, one row each."""
        return [
            [name or "(the model itself)", *layer.cells, *([f"{self.even.widths[name]:,}"] if self.even else [])]
            for name, layer in self.layers.items()
        ]

    @property
    def states(self) -> list[str]:
        """Titles of what :meth:`sizes` compares."""
        return ["now", *([f"at {self.even.target:.0%}"] if self.even else []), "at least"]

    def sizes(self) -> list[list[str]]:
        """Return the model's sizes, one row each."""
        shown = [self.size, *([self.even.size] if self.even else []), self.least]
        return [
            [title, *(f"{getattr(size, name):,}" for size in shown)]
            for title, name in (("neurons", "neurons"), ("parameters", "parameters"), ("MACs", "macs"))
        ]

    def _tied_lines(self) -> Iterable[str]:
        most = max((len(f"{tied.groups:,}") for tied in self.tied), default=0)
        return [f"{tied.groups:{most},} x {' + '.join(tied.names())}" for tied in self.tied] or ["none"]

    def _frozen_lines(self) -> Iterable[str]:
        return [f"{reason}: {', '.join(names)}" for reason, names in by_reason(self.frozen).items()]


def _listed(lines: Iterable[str], width: int) -> list[str]:
    wrapper = textwrap.TextWrapper(
        width, initial_indent="  ", subsequent_indent=" " * 6, break_long_words=False, break_on_hyphens=False
    )
    return [wrapper.fill(line) for line in lines]


def inspect(model: nn.Module, example_inputs: Any, target: float | None = None) -> Inspection:
    """Find out what could be pruned of a model; the model is not changed, and needs no optimizer.

    Args:
        model: The model.
        example_inputs: What it is called with: a tensor, a tuple of positional or a dict of keyword arguments. Only
            shapes and dtypes matter.
        target: Share of the neurons, in (0, 1): tell also what would be left of each layer without so many, if all
            layers lost the same share. A training run chooses otherwise, by what the neurons are worth.

    Raises:
        ValueError: if the model has no channels, cannot be traced or does not run on the inputs, or if so many neurons
            cannot go.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(inspect(model, torch.ones(1, 4), target=0.5).table())
        layer  in  out  can go  parameters  MACs    type  at 50%
        0       4    8       7          40    32  Linear       4
        2       8    3       0          27    24  Linear       3
        <BLANKLINE>
                    now  at 50%  at least
        neurons       8       4         1
        parameters   67      35        11
        MACs         56      28         7
        <BLANKLINE>
        95.5% of the parameters are in tensors that can shrink.
        <BLANKLINE>
        Channels that go together, and how often:
          8 x 0
        <BLANKLINE>
        Frozen:
          forms the model's output: 2
    """
    model = unwrap(model)
    graph = NeuronGraph(model, example_inputs)
    if not graph.producers:
        raise ValueError(f"{type(model).__name__} has no Linear layer and no convolution, so no neurons")
    share = 0.5 if target is None else target
    options = Options(share, "neurons", None, 1, 1.0, 1.0, 1, Ranking("layer"))
    dense = Remaining.everything(model, graph, options)
    most = dense.fewest([0.0] * len(dense.groups.ids), 0.0, options)
    least = dense.removal(most).left
    return Inspection(
        {name: _layer(model, name, dense, least) for name in graph.producers},
        [Tied(len(kind.groups), dict(kind.members)) for kind in dense.groups.kinds],
        dense.size,
        least.size,
        _reached(model, dense, most),
        dict(graph.frozen),
        None if target is None else _even_cut(dense, least, options),
    )


def _layer(model: nn.Module, name: str, dense: Remaining, least: Remaining) -> Layer:
    module = model.get_submodule(name)
    inputs, outputs = layers.channel_counts(module)
    applied = dense.graph.positions.get(name)
    return Layer(
        type(module).__name__,
        inputs,
        outputs,
        outputs - len(least.channels[name].outputs),
        sum(p.numel() for p in module.parameters()),
        None if applied is None else round(layers.weight_of(module).numel() * applied),
    )


def _reached(model: nn.Module, dense: Remaining, gone: Tensor) -> int:
    """Count the parameters in tensors that become smaller without these groups."""
    small = skeleton(model)
    Surgery(small, kept_without(dense.channels, gone)).apply()
    left = dict(small.named_parameters())
    return sum(p.numel() for name, p in model.named_parameters() if left[name].shape != p.shape)


def _even_cut(dense: Remaining, least: Remaining, options: Options) -> EvenCut:
    neurons = dense.size.neurons
    goal = options.goal(neurons, event=1, share=1.0)
    if not neurons or least.size.neurons > goal:
        raise ValueError(
            f"target={options.target} cannot be reached: {percent(neurons - least.size.neurons, neurons)} of the "
            "neurons can go at most"
        )
    gone = dense.fewest([0.0] * len(dense.groups.ids), goal, options)
    left = dense.removal(gone).left
    return EvenCut(options.target, left.widths(), left.size)
