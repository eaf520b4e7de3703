"""Random networks: small programs of layers and tensor operations, each reading what earlier ones made.

A program is drawn instruction by instruction. Each runs once as it is added, so that the next ones know what shapes
there are. What no instruction reads in the end goes into a head, so that everything matters to the output.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from tests.pruning.nets import Case

# Of a value, without the axis of examples: (channels, height, width), (tokens, channels) or (channels,).
Shape: TypeAlias = tuple[int, ...]

_MOST_NUMBERS, _MOST_CHANNELS, _BATCH = 1200, 32, 4


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes:
        kind: Its name in :data:`KINDS`, or ``"head"``.
        run: A function of the sources, or what makes the module to call.
        sources: Numbers of the values that it reads.
        results: How many values it makes.
        layer: Name of the module, if it calls one; an earlier step's where a module is called again.
        tied_to: Name of the module whose weight it shares.
    """

    kind: str
    run: Callable[..., Any]
    sources: tuple[int, ...]
    results: int = 1
    layer: str | None = None
    tied_to: str | None = None

    def __str__(self) -> str:
        what = self.layer or ""
        how = ", ".join([*map(_text, getattr(self.run, "args", ())), *_options(self.run)])
        tied = f" weight of {self.tied_to}" if self.tied_to else ""
        return f"{self.kind}{list(self.sources)} -> {self.results}: {what} {_text(self.run)}({how}){tied}"


def _text(value: Any) -> str:
    return getattr(getattr(value, "func", value), "__name__", repr(value))


def _options(run: Any) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in getattr(run, "keywords", {}).items()]


@dataclass(frozen=True)
class Architecture:
    """A program, and the shape of its input."""

    shape: Shape
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    @property
    def case(self) -> Case:
        """The network and how it is called, as the fixed ones are."""
        return Case(lambda: Interpreter(self), lambda n: torch.randn(n, *self.shape, dtype=torch.float64))

    def __deepcopy__(self, memo: dict[int, Any]) -> Architecture:
        return self  # nothing in it changes

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # rather than field by field, when hypothesis shows what failed

    def __repr__(self) -> str:
        lines, number = [f"Architecture: value 0 is {self.shape}"], 1
        for step in self.steps:
            lines.append(f"  {number}: {step}")
            number += step.results
        return "\n".join([*lines, f"  returns {list(self.outputs)}"])


class Interpreter(nn.Module):
    """The network of a program."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        for step in architecture.steps:
            if step.layer is not None and not hasattr(self, step.layer):
                self.add_module(step.layer, step.run())
            if step.tied_to is not None:
                getattr(self, str(step.layer)).weight = getattr(self, step.tied_to).weight

    def values(self, x: Tensor) -> list[Tensor]:
        """Everything that is computed on the way, by number."""
        values = [x]
        for step in self.architecture.steps:
            run = step.run if step.layer is None else getattr(self, step.layer)
            result = run(*(values[i] for i in step.sources))
            values += [result] if step.results == 1 else [result[i] for i in range(step.results)]
        return values

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self.values(x)
        return tuple(values[i] for i in self.architecture.outputs)


# ---------------------------------------------------------------- what a program is drawn with


@dataclass
class Drawing:
    """A program that is being drawn.

    Attributes:
        draw: Hypothesis'.
        shapes: Of every value.
        steps: So far.
        read: Numbers of the values that some step reads.
        kind: Of the steps being added.
    """

    draw: Callable[[st.SearchStrategy[Any]], Any]
    shapes: list[Shape]
    steps: list[Step] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    kind: str = ""

    def one_of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def call(self, run: Callable[..., Any], *sources: int, results: int = 1) -> int:
        """Add a function of values; returns the number of its first result."""
        return self.add(Step(self.kind, run, sources, results))

    def layer(self, make: Callable[..., nn.Module], source: int, *args: Any, **options: Any) -> int:
        """Add a module; returns the number of its result."""
        return self.add(Step(self.kind, partial(make, *args, **options), (source,), layer=f"m{len(self.steps)}"))

    def add(self, step: Step) -> int:
        """Add a step; returns the number of its first result."""
        before = [torch.empty(_BATCH, *self.shapes[i]) for i in step.sources]
        with torch.no_grad():
            run = step.run() if step.layer else step.run
            result = run(*before)
        self.shapes += [tuple(t.shape[1:]) for t in ([result] if step.results == 1 else result)]
        self.steps.append(step)
        self.read.update(step.sources)
        return len(self.shapes) - step.results


Emit: TypeAlias = Callable[[Drawing, int], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of instruction: which values it can read, and how it is added to a program."""

    reads: Callable[[Drawing, int], bool]
    emit: Emit


KINDS: dict[str, Kind] = {}


def kind_where(reads: Callable[[Drawing, int], bool]) -> Callable[[Emit], Emit]:
    """Make a function that adds instructions a kind of its own, for the values of which this holds."""

    def register(emit: Emit) -> Emit:
        KINDS[emit.__name__] = Kind(reads, emit)
        return emit

    return register


def kind(fits: Callable[[Shape], bool]) -> Callable[[Emit], Emit]:
    """Make a function that adds instructions a kind of its own, for values of such shapes."""
    return kind_where(lambda p, i: fits(p.shapes[i]))


def is_map(shape: Shape) -> bool:
    return len(shape) == 3 and math.prod(shape[1:]) > 1


def is_large_map(shape: Shape) -> bool:
    return is_map(shape) and min(shape[1:]) >= 4


def is_small_map(shape: Shape) -> bool:
    return is_map(shape) and math.prod(shape) * 4 <= _MOST_NUMBERS


def is_tokens(shape: Shape) -> bool:
    return len(shape) == 2


def is_vector(shape: Shape) -> bool:
    return len(shape) == 1


def is_any(shape: Shape) -> bool:
    return is_map(shape) or is_tokens(shape) or is_vector(shape)


def has_places(shape: Shape) -> bool:
    return is_map(shape) or is_tokens(shape)


def is_row(shape: Shape) -> bool:
    return is_tokens(shape) or is_vector(shape)


def channels_of(shape: Shape) -> int:
    return shape[-1] if is_tokens(shape) else shape[0]


def axis_of(shape: Shape) -> int:
    """Axis of the channels, examples counted."""
    return 2 if is_tokens(shape) else 1


def divided(*divisors: int) -> Callable[[Shape], bool]:
    """Maps whose channels can be divided by one of these."""
    return lambda shape: is_map(shape) and any(shape[0] % d == 0 and shape[0] > d for d in divisors)


def divisor(p: Drawing, channels: int, *choices: int) -> int:
    return p.one_of(*(d for d in choices if channels % d == 0 and channels > d))


def width(p: Drawing, source: int, multiple: int = 1) -> int:
    """Draw the width of a layer, often that of what it reads, so that residual additions find their match."""
    before = channels_of(p.shapes[source])
    return p.one_of(*(w for w in (8, 4, 6, 9, 12, before, before) if w % multiple == 0 and 4 <= w <= 12))


def recent(p: Drawing) -> list[int]:
    """Values that an instruction may read, the latest first; the network's input is left to layers."""
    return list(range(len(p.shapes) - 1, max(0, len(p.shapes) - 5), -1))


def alike(p: Drawing, source: int) -> list[int]:
    """Other values of the same shape."""
    return [i for i in range(len(p.shapes) - 1, 0, -1) if i != source and p.shapes[i] == p.shapes[source]]


def joinable(p: Drawing, source: int) -> list[int]:
    """Values, this one included, that differ in the number of channels at most."""
    shape = p.shapes[source]
    if not is_any(shape) or 2 * channels_of(shape) > _MOST_CHANNELS:
        return []
    axis, found = axis_of(shape) - 1, []
    for i in range(len(p.shapes) - 1, 0, -1):
        other = p.shapes[i]
        same = len(other) == len(shape) and all(
            a == b for d, (a, b) in enumerate(zip(shape, other, strict=True)) if d != axis
        )
        if same and other[axis] + shape[axis] <= _MOST_CHANNELS:
            found.append(i)
    return found


# ---------------------------------------------------------------- layers


def conv(p: Drawing, source: int, kernel: int, c_out: int, groups: int = 1) -> int:
    c_in, *size = p.shapes[source]
    options: dict[str, Any] = {"groups": groups, "bias": p.one_of(True, False)}
    if min(size) >= 4:
        options["stride"] = p.one_of(1, 1, 2)
    if kernel == 3:
        options["dilation"] = options["padding"] = p.one_of(1, 1, 2)
    return p.layer(nn.Conv2d, source, c_in, c_out, kernel, **options)


@kind(is_map)
def conv3x3(p: Drawing, source: int) -> None:
    conv(p, source, 3, width(p, source))


@kind(is_map)
def conv1x1(p: Drawing, source: int) -> None:
    conv(p, source, 1, width(p, source))


@kind(is_row)
def linear(p: Drawing, source: int) -> None:
    p.layer(nn.Linear, source, p.shapes[source][-1], width(p, source), bias=p.one_of(True, False))


@kind(is_small_map)
def transposed_conv(p: Drawing, source: int) -> None:
    how = p.one_of({"kernel_size": 2, "stride": 2}, {"kernel_size": 3, "padding": 1})
    p.layer(nn.ConvTranspose2d, source, p.shapes[source][0], width(p, source), bias=p.one_of(True, False), **how)


# What may read the network's input, and stands at the beginning.
FIRST = tuple(KINDS)


@kind(divided(2, 3))
def grouped_conv(p: Drawing, source: int) -> None:
    groups = divisor(p, p.shapes[source][0], 2, 3)
    conv(p, source, p.one_of(3, 1), p.one_of(6, 12), groups)


@kind(divided(1))
def depthwise_conv(p: Drawing, source: int) -> None:
    channels = p.shapes[source][0]
    conv(p, source, 3, channels * (p.one_of(1, 1, 2) if channels <= 6 else 1), channels)


@kind(divided(2))
def grouped_transposed_conv(p: Drawing, source: int) -> None:
    p.layer(nn.ConvTranspose2d, source, p.shapes[source][0], width(p, source, 2), 3, padding=1, groups=2)


def turn(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


@kind(is_tokens)
def conv1d(p: Drawing, source: int) -> None:
    p.call(turn, p.layer(nn.Conv1d, p.call(turn, source), p.shapes[source][1], width(p, source), 3, padding=1))


@kind(is_tokens)
def mix_tokens(p: Drawing, source: int) -> None:
    p.call(turn, p.layer(nn.Linear, p.call(turn, source), p.shapes[source][0], p.one_of(4, 6)))


def weight_normed(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return weight_norm(make(*args))


@kind(is_any)
def parametrized(p: Drawing, source: int) -> None:
    shape = p.shapes[source]
    what = (nn.Conv2d, shape[0], width(p, source), 1) if is_map(shape) else (nn.Linear, shape[-1], width(p, source))
    p.layer(weight_normed, source, *what)


def layers_called(p: Drawing, source: int) -> list[Step]:
    """Earlier calls of layers that could be made of this value."""
    shape = p.shapes[source]
    return [s for s in p.steps if s.layer and p.shapes[s.sources[0]] == shape and source not in s.sources]


@kind_where(lambda p, i: bool(layers_called(p, i)))
def shared_module(p: Drawing, source: int) -> None:
    step = p.one_of(*layers_called(p, source))
    p.add(Step(p.kind, step.run, (source,), layer=step.layer))


def tieable(p: Drawing, source: int) -> list[Step]:
    return [s for s in layers_called(p, source) if s.tied_to is None and s.kind in (*FIRST, "grouped_conv")]


@kind_where(lambda p, i: bool(tieable(p, i)))
def tied_weight(p: Drawing, source: int) -> None:
    step = p.one_of(*tieable(p, source))
    p.add(Step(p.kind, step.run, (source,), layer=f"m{len(p.steps)}", tied_to=step.layer))


# ---------------------------------------------------------------- norms


@kind(is_any)
def batch_norm(p: Drawing, source: int) -> None:
    shape = p.shapes[source]
    options = {"affine": p.one_of(True, True, False)}
    if is_tokens(shape):
        p.call(turn, p.layer(nn.BatchNorm1d, p.call(turn, source), shape[1], **options))
    else:
        p.layer(nn.BatchNorm2d if is_map(shape) else nn.BatchNorm1d, source, shape[0], **options)


@kind(is_map)
def instance_norm(p: Drawing, source: int) -> None:
    options = {"affine": p.one_of(True, False), "track_running_stats": p.one_of(False, True)}
    p.layer(nn.InstanceNorm2d, source, p.shapes[source][0], **options)


@kind(divided(1, 2, 3))
def group_norm(p: Drawing, source: int) -> None:
    channels = p.shapes[source][0]
    p.layer(nn.GroupNorm, source, p.one_of(*(g for g in (2, 3, 4, channels, 1) if channels % g == 0)), channels)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@kind(is_any)
def layer_norm(p: Drawing, source: int) -> None:
    channels = channels_of(p.shapes[source])
    if is_map(p.shapes[source]):
        p.call(channels_first, p.layer(nn.LayerNorm, p.call(channels_last, source), channels))
    else:
        p.layer(nn.LayerNorm, source, channels)


# ---------------------------------------------------------------- pooling, padding, resizing


@kind(is_large_map)
def pool(p: Drawing, source: int) -> None:
    size = p.one_of({"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1})
    if p.one_of(True, False):
        p.layer(p.one_of(nn.MaxPool2d, nn.AvgPool2d), source, **size)
    else:
        p.call(partial(p.one_of(F.max_pool2d, F.avg_pool2d), **size), source)


@kind(is_large_map)
def adaptive_pool(p: Drawing, source: int) -> None:
    p.layer(p.one_of(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), source, p.one_of(2, (3, 1)))


@kind(has_places)
def reduced(p: Drawing, source: int) -> None:
    dim = (2, 3) if is_map(p.shapes[source]) else (1,)
    p.call(partial(p.one_of(torch.mean, torch.amax), dim=dim), source)


@kind(is_map)
def pad(p: Drawing, source: int) -> None:
    widths, how = p.one_of(((1, 0, 0, 1), "constant"), ((0, 1), "constant"), ((1, 1, 1, 0), "replicate"))
    if how == "constant" and len(widths) == 4 and p.one_of(False, True):
        p.layer(nn.ZeroPad2d, source, widths)
    else:
        p.call(partial(F.pad, pad=widths, mode=how), source)


@kind(is_small_map)
def resize(p: Drawing, source: int) -> None:
    how = p.one_of({"scale_factor": 2, "mode": "nearest"}, {"size": (4, 5), "mode": "bilinear"})
    if p.one_of(True, False):
        p.layer(nn.Upsample, source, **how)
    else:
        p.call(partial(F.interpolate, **how), source)


# ---------------------------------------------------------------- data movement


@kind(is_map)
def flatten(p: Drawing, source: int) -> None:
    if math.prod(p.shapes[source]) <= 120:
        p.call(p.one_of(flat, flat_by_view, flat_channels_last), source)
    else:
        p.call(flat, p.layer(nn.AdaptiveAvgPool2d, source, (2, 1)))


def flat(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)


def flat_by_view(x: Tensor) -> Tensor:
    return x.contiguous().view(x.size(0), -1)


def flat_channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1)


@kind(lambda shape: is_vector(shape) and shape[0] % 4 == 0 and shape[0] > 4)
def unflatten(p: Drawing, source: int) -> None:
    p.call(partial(torch.unflatten, dim=1, sizes=(-1, 2, 2)), source)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@kind(is_map)
def tokens(p: Drawing, source: int) -> None:
    p.call(to_tokens, source)


def to_map(x: Tensor, height: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), height, -1)


@kind(lambda shape: is_tokens(shape) and shape[0] % 2 == 0)
def map_of_tokens(p: Drawing, source: int) -> None:
    p.call(partial(to_map, height=2), source)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    return x.contiguous().view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@kind(divided(2, 3))
def channel_shuffle(p: Drawing, source: int) -> None:
    groups = divisor(p, p.shapes[source][0], 2, 3)
    if p.one_of(True, False):
        p.layer(nn.ChannelShuffle, source, groups)
    else:
        p.call(partial(shuffled, groups=groups), source)


@kind(divided(4))
def pixel_shuffle(p: Drawing, source: int) -> None:
    if p.one_of(True, False):
        p.layer(nn.PixelShuffle, source, 2)
    else:
        p.call(partial(F.pixel_shuffle, upscale_factor=2), source)


@kind(lambda shape: is_map(shape) and shape[0] <= 6 and shape[1] % 2 == shape[2] % 2 == 0)
def pixel_unshuffle(p: Drawing, source: int) -> None:
    p.layer(nn.PixelUnshuffle, source, 2)


def even(shape: Shape) -> bool:
    return is_any(shape) and channels_of(shape) % 2 == 0


def halves(x: Tensor, dim: int) -> Any:
    return x.chunk(2, dim)


def halves_by_split(x: Tensor, dim: int) -> Any:
    return torch.split(x, x.size(dim) // 2, dim)


@kind(even)
def split(p: Drawing, source: int) -> None:
    p.call(partial(p.one_of(halves, halves_by_split), dim=axis_of(p.shapes[source])), source, results=2)


@kind(lambda shape: is_any(shape) and channels_of(shape) > 3)
def uneven_split(p: Drawing, source: int) -> None:
    channels, dim = channels_of(p.shapes[source]), axis_of(p.shapes[source])
    p.call(partial(torch.split, split_size_or_sections=[3, channels - 3], dim=dim), source, results=2)


def first_places(x: Tensor) -> Tensor:
    return x[:, :, :2]


@kind(is_large_map)
def places_cut_out(p: Drawing, source: int) -> None:
    p.call(first_places, source)


def first_channels(x: Tensor) -> Tensor:
    return x[:, :3]


@kind(lambda shape: is_map(shape) and shape[0] > 3)
def channels_cut_out(p: Drawing, source: int) -> None:
    p.call(first_channels, source)


@kind(is_map)
def turned_over(p: Drawing, source: int) -> None:
    p.call(partial(torch.flip, dims=p.one_of((2,), (1,))), source)


# ---------------------------------------------------------------- where values meet


def joined(*tensors: Tensor, dim: int) -> Tensor:
    return torch.cat(tensors, dim)


@kind_where(lambda p, i: bool(joinable(p, i)))
def cat(p: Drawing, source: int) -> None:
    p.call(partial(joined, dim=axis_of(p.shapes[source])), p.one_of(*joinable(p, source)), source)


@kind_where(lambda p, i: has_places(p.shapes[i]) and bool(alike(p, i)))
def cat_of_places(p: Drawing, source: int) -> None:
    p.call(partial(joined, dim=1 if is_tokens(p.shapes[source]) else 2), p.one_of(*alike(p, source)), source)


def partly_subtracted(x: Tensor, y: Tensor) -> Tensor:
    return operator.sub(x, 0.3 * y)  # all of it would leave nothing where y is x once more


@kind_where(lambda p, i: bool(alike(p, i)))
def add(p: Drawing, source: int) -> None:
    p.call(p.one_of(operator.add, torch.add, partly_subtracted), source, p.one_of(*alike(p, source)))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


@kind_where(lambda p, i: bool(alike(p, i)))
def multiply(p: Drawing, source: int) -> None:
    p.call(p.one_of(gated, torch.mul, torch.maximum), source, p.one_of(*alike(p, source)))


def spread(x: Tensor, vector: Tensor) -> Tensor:
    return x + vector[:, :, None, None]


def spread_by_unsqueeze(x: Tensor, vector: Tensor) -> Tensor:
    return x * vector.unsqueeze(-1).unsqueeze(-1).expand_as(x)


@kind(is_map)
def broadcast(p: Drawing, source: int) -> None:
    channels = p.shapes[source][0]
    vector = p.layer(nn.Linear, p.call(partial(torch.amax, dim=(2, 3)), source), channels, channels)
    p.call(p.one_of(spread, spread_by_unsqueeze), source, vector)


@kind(is_map)
def squeeze_excite(p: Drawing, source: int) -> None:
    channels = p.shapes[source][0]
    squeezed = p.layer(nn.Conv2d, p.layer(nn.AdaptiveAvgPool2d, source, 1), channels, 4, 1)
    p.call(gated, source, p.layer(nn.Conv2d, p.layer(nn.ReLU, squeezed), 4, channels, 1))


@kind(is_map)
def residual(p: Drawing, source: int) -> None:
    channels = p.shapes[source][0]
    inner = p.layer(nn.Conv2d, source, channels, width(p, source), 3, padding=1, bias=False)
    inner = p.layer(nn.ReLU, p.layer(nn.BatchNorm2d, inner, p.shapes[inner][0]))
    p.call(operator.iadd, p.layer(nn.Conv2d, inner, p.shapes[inner][0], channels, 3, padding=1), source)


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, size: int) -> Tensor:
    n, count, _ = q.size()
    q, k, v = (t.view(n, count, heads, size).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, count, -1)


@kind(is_tokens)
def attention(p: Drawing, source: int) -> None:
    channels, inner = p.shapes[source][1], 12
    heads, size = p.one_of((-1, 3), (3, 4), (4, -1))
    qkv = [p.layer(nn.Linear, source, channels, inner) for _ in range(3)]
    mixed = p.call(partial(attended, heads=heads, size=size), *qkv)
    p.call(operator.add, source, p.layer(nn.Linear, mixed, inner, channels))


# ---------------------------------------------------------------- element by element


@kind(is_any)
def activation(p: Drawing, source: int) -> None:
    if p.one_of(True, False):
        p.layer(p.one_of(nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Softplus, nn.ELU), source)
    else:
        p.call(p.one_of(F.relu, F.gelu, torch.tanh, F.leaky_relu, torch.abs, F.mish, scaled), source)


def scaled(x: Tensor) -> Tensor:
    return 2 * x - 1


@kind_where(lambda p, i: i not in p.read and p.steps[-1].kind in FIRST and i == len(p.shapes) - 1)
def activation_in_place(p: Drawing, source: int) -> None:
    p.call(p.one_of(F.relu_, partial(F.leaky_relu, inplace=True)), source)


@kind(is_any)
def prelu(p: Drawing, source: int) -> None:
    channels = channels_of(p.shapes[source])
    p.layer(nn.PReLU, source, 1 if is_tokens(p.shapes[source]) else p.one_of(channels, 1))


@kind(is_any)
def dropout(p: Drawing, source: int) -> None:
    p.layer(p.one_of(nn.Dropout, nn.Dropout2d) if is_map(p.shapes[source]) else nn.Dropout, source, 0.0)


@kind(is_any)
def softmax(p: Drawing, source: int) -> None:
    p.call(partial(torch.softmax, dim=axis_of(p.shapes[source])), source)


# ---------------------------------------------------------------- whole programs

_LIKELY = (
    *FIRST,
    "grouped_conv",
    "depthwise_conv",
    "residual",
    "batch_norm",
    "activation",
    "add",
    "cat",
    "shared_module",
)
# Instructions after which every neuron stays that they read: they mix neurons, or have their number written into them.
KEEPING = {"layer_norm", "softmax", "uneven_split", "channels_cut_out", "mix_tokens", "parametrized", "unflatten"}
KEEPING |= {"grouped_transposed_conv", "pixel_unshuffle"}
_CUTTING = tuple(kind for kind in KINDS if kind not in KEEPING)
_ENDING = {3: (2, 3), 2: (1,), 1: ()}


def finish(p: Drawing) -> list[int]:
    """Let every value that nothing else reads matter to the output; returns what that is made of."""
    p.kind, outputs, vectors = "head", [], []
    for i in [i for i in range(1, len(p.shapes)) if i not in p.read]:
        dims = _ENDING[len(p.shapes[i])]
        if p.one_of(*([False] * 15), True):
            outputs.append(i)
        else:
            vectors.append(p.call(partial(torch.mean, dim=dims), i) if dims else i)
    if p.one_of(True, False) and len(vectors) > 1:
        vectors = [p.call(partial(joined, dim=1), *vectors)]
    return outputs + [p.layer(nn.Linear, i, p.shapes[i][0], 3) for i in vectors]


@st.composite
def architectures(draw: Any, favourites: tuple[str, ...] = _CUTTING) -> Architecture:
    """Draw a program of up to eight instructions, one of these kinds being likelier than all the others."""
    shape = draw(st.sampled_from([(2, 6, 6), (3, 4, 8), (2, 5, 7), (6, 5), (6,)]))
    favourite = draw(st.sampled_from(favourites))
    p = Drawing(draw, [shape])
    for number in range(draw(st.integers(3, 8))):
        sources = recent(p) if number else [0]
        names = [n for n in (KINDS if number else FIRST) if any(KINDS[n].reads(p, i) for i in sources)]
        likely = [n for n in _LIKELY if n in names] + [favourite] * (favourite in names) * (len(names) // 3)
        p.kind = draw(st.sampled_from(names + likely))
        chosen = KINDS[p.kind]
        chosen.emit(p, draw(st.sampled_from([i for i in sources if chosen.reads(p, i)])))
    outputs = finish(p)
    return Architecture(shape, tuple(p.steps), tuple(outputs))
