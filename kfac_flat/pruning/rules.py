"""What each operation does to neuron ids.

A rule gets an operation whose tensor arguments have been replaced by their ids and returns the ids of its result. What
only moves data is executed on the ids themselves. An operation without a rule is never guessed: its neurons are frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat.nested import map_tensors
from kfac_flat.pruning.ids import along, fixed, narrowed, read_along, varying_dims


class Table(Protocol):
    """Where rules report what they find out about ids."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """State that the neurons at equal places (same shape) can only go together."""

    def freeze(self, ids: Tensor, reason: str) -> None:
        """State that these neurons cannot go."""

    def used_elsewhere(self, name: str) -> None:
        """State that a parameter or buffer is used by other code than its module's."""

    def layer(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        """Note what a layer reads, channel by channel, and return the ids of its outputs."""


class NoRuleError(Exception):
    """The operation cannot be followed: its neurons are frozen for the reason given."""


@dataclass(frozen=True)
class Operation:
    """A call in the traced model that is no layer.

    Attributes:
        table: Where to report.
        target: A function, the name of a tensor method, or a module.
        args: Positional arguments, ids in place of tensors.
        kwargs: Keyword arguments, likewise.
        literals: Whole numbers written into the call rather than computed from shapes.
        result: What the call returned, tensors without data.
    """

    table: Table
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    literals: frozenset[int]
    result: Any

    @property
    def subject(self) -> Tensor:
        """Ids of the tensor that the call is about."""
        subject = self.args[0] if self.args else self.kwargs.get("input")
        if not isinstance(subject, Tensor):
            raise NoRuleError("is not called on a tensor")
        return subject

    def on(self, subject: Tensor) -> Any:
        """Execute the call on another tensor of the subject's shape."""
        rest, kwargs = self.args[1:], {key: value for key, value in self.kwargs.items() if key != "input"}
        if not isinstance(self.target, str):
            return self.target(subject, *rest, **kwargs)
        # ids repeat by stride 0, which view() does not accept where reshape() does
        return getattr(subject, {"view": "reshape"}.get(self.target, self.target))(*rest, **kwargs)


Rule: TypeAlias = Callable[[Operation], Any]


# ---------------------------------------------------------------- modules with channels of their own

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCERS = (nn.Linear, *CONVS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PASSING = (*BATCH_NORMS, *INSTANCE_NORMS, nn.PReLU)


def _is(module: nn.Module, kinds: Iterable[type[nn.Module]]) -> bool:
    """Tell whether the module is one of ``kinds``, or a subclass that computes the same, from plain parameters."""
    same = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    return same and "weight" in module._parameters


def is_producer(module: nn.Module) -> bool:
    """Tell whether the module's output channels are neurons: Linear and convolutions."""
    return _is(module, PRODUCERS) and not (isinstance(module, TRANSPOSED) and module.groups > 1)


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether every output channel of a convolution reads a single input channel, with which it goes."""
    return isinstance(module, CONVS) and module.groups == module.in_channels > 1


def passes_channels(module: nn.Module) -> bool:
    """Tell whether the module has a number or two for each channel and hands the channels on: norms, PReLU."""
    return _is(module, PASSING) and not (isinstance(module, nn.PReLU) and module.num_parameters == 1)


def has_channels(module: nn.Module) -> bool:
    """Tell whether the module's tensors are cut along with the neurons."""
    return is_producer(module) or passes_channels(module)


def channel_counts(module: nn.Module) -> tuple[int, int]:
    """Number of input and output channels of a module that has channels.

    Raises:
        TypeError: if it has none.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return module.in_channels, module.out_channels
    if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        return module.num_features, module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters, module.num_parameters
    raise TypeError(f"{type(module).__name__} has no channels that could be cut")


def _channel_axis(module: nn.Module, x: Tensor) -> int:
    """Axis of a module's input along which its channels lie."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return x.dim() - 1 - len(module.kernel_size)
    spatial = [i + 1 for i, kind in enumerate(INSTANCE_NORMS) if isinstance(module, kind)]
    return x.dim() - 1 - spatial[0] if spatial else 1


def run_layer(table: Table, name: str, module: nn.Module, x: Tensor, result: Tensor) -> Tensor:
    """Read the channels of ``x`` and lay out the layer's own channels in the shape of its result."""
    dim = _channel_axis(module, x)
    inputs = read_along(x, dim)
    if inputs is None:
        table.freeze(x, f"{name} reads different neurons at different positions")
        inputs = fixed(torch.Size([x.shape[dim]]))
    return along(table.layer(name, module, inputs), dim, result.shape)


# ---------------------------------------------------------------- operations without channels of their own


def _pointwise(op: Operation) -> Tensor:
    """Element by element: what meets at one place goes together; what is spread over several neurons stays."""
    operands = [a for a in (*op.args, *op.kwargs.values()) if isinstance(a, Tensor)]
    full = next((ids for ids in operands if ids.shape == op.result.shape), None)
    if full is None:
        raise NoRuleError("broadcasts every operand")
    varying = set(varying_dims(full))
    for ids in operands:
        sizes = (1,) * (full.dim() - ids.dim()) + tuple(ids.shape)
        if varying & {d for d, size in enumerate(sizes) if size < full.shape[d]}:
            op.table.freeze(ids, "multiplies or shifts several other neurons at once")
        elif ids is not full:
            op.table.tie(*narrowed(full, ids.expand(full.shape)))
    return full


def _spatial(dims: int) -> Rule:
    """Return the rule of an operation on the last ``dims`` axes that treats each channel alike, such as pooling."""

    def rule(op: Operation) -> Tensor:
        ids = op.subject
        if not isinstance(op.result, Tensor) or op.result.shape[:-dims] != ids.shape[:-dims]:
            raise NoRuleError("returns more than one tensor, or changes the axis of neurons")
        if any(d >= ids.dim() - dims for d in varying_dims(ids)):
            raise NoRuleError("mixes positions that belong to different neurons")
        for d in range(ids.dim() - dims, ids.dim()):
            ids = ids.narrow(d, 0, 1)
        return ids.expand(op.result.shape)

    return rule


def _reduce(op: Operation) -> Tensor:
    """Mean, sum and the like over axes along which the neuron is the same."""
    ids = op.subject
    if not isinstance(op.result, Tensor):
        raise NoRuleError("returns more than one tensor")
    dims = {d % ids.dim() for d in _reduced_dims(*op.args, **op.kwargs) or range(ids.dim())}
    if dims & set(varying_dims(ids)):
        raise NoRuleError("mixes different neurons")
    keepdim = op.result.dim() == ids.dim()
    index = tuple((slice(0, 1) if keepdim else 0) if d in dims else slice(None) for d in range(ids.dim()))
    return ids[index]


def _reduced_dims(input: Any = None, dim: Any = None, *_: Any, axis: Any = None, **__: Any) -> tuple[int, ...]:
    """Read the axes off a reduction's arguments, which torch and NumPy name differently; none stands for all."""
    dim = axis if dim is None else dim
    if isinstance(dim, bool):  # std(x, unbiased)
        return ()
    return (dim,) if isinstance(dim, int) else tuple(dim or ())


def _cat(op: Operation) -> Tensor:
    """Concatenation: side by side along the axis of neurons, tied along any other."""
    tensors, dim = _concatenation(*op.args, **op.kwargs)
    dim %= op.result.dim()
    lines = [read_along(ids, dim) for ids in tensors]
    if all(line is not None for line in lines):
        return along(torch.cat([line for line in lines if line is not None]), dim, op.result.shape)
    if any(dim in varying_dims(ids) for ids in tensors):
        raise NoRuleError("concatenates neurons along two axes")
    rows = [ids.narrow(dim, 0, 1) for ids in tensors]
    for row in rows[1:]:
        op.table.tie(*narrowed(rows[0], row))
    return rows[0].expand(op.result.shape)


def _concatenation(tensors: Any, dim: int = 0, axis: int | None = None) -> tuple[list[Tensor], int]:
    """Sort out the arguments of ``torch.cat`` by the names that torch gives them."""
    return list(tensors), dim if axis is None else axis


def _move(op: Operation) -> Any:
    """Data movement: what it does to the neurons' places, it does to their ids.

    It must do the same once some neurons are gone. That holds if they come out in one axis in the order they went in,
    all repeated alike. It also holds if they are dealt out in rows of equal length (chunks, channel shuffle) and every
    row loses the same ones, so these are tied.
    """
    if op.target is operator.getitem and not isinstance(op.args[0], Tensor):
        return operator.getitem(*op.args)  # one of several results
    axes = varying_dims(op.subject)
    if not axes:
        return op.on(op.subject)
    line = read_along(op.subject, axes[0])
    if line is None:
        raise NoRuleError("moves neurons that lie along two axes")
    moved = op.on(along(torch.arange(len(line)), axes[0], op.subject.shape))
    parts = [moved] if isinstance(moved, Tensor) else list(moved)
    for part in parts:
        for size in (part.shape[d] for d in varying_dims(part)[-1:]):  # an axis before it would be one of rows
            if op.target in _SIZED and size in op.literals:
                raise NoRuleError(f"has a size that depends on the neurons, {size}, written into it")
    row = len(line)
    if not all(_in_order(part, len(line)) for part in parts):
        rows = _rows(parts, len(line))
        op.table.tie(line[rows[:1]].expand(rows.shape), line[rows])
        row = rows.shape[1]
    return map_tensors(lambda places: _lookup(line, places % row), moved)


def _in_order(places: Tensor, count: int) -> bool:
    """Tell whether all neurons come out in one axis, in the order they went in, all repeated alike."""
    axes = varying_dims(places)
    came_out = read_along(places, axes[0]) if axes else None
    if came_out is None or len(came_out) % count:
        return False
    times, went_in = len(came_out) // count, torch.arange(count)
    return torch.equal(came_out, went_in.repeat_interleave(times)) or torch.equal(came_out, went_in.repeat(times))


def _rows(parts: list[Tensor], count: int) -> Tensor:
    """Return the places ``[rows, neurons per row]`` that neurons were dealt out to, in order."""
    lines: list[Tensor | None] = []
    if len(parts) == 1 and len(axes := varying_dims(parts[0])) == 2:
        lines = [read_along(row, axes[1] - 1) for row in parts[0].unbind(axes[0])]
    elif all(len(varying_dims(part)) == 1 for part in parts):
        lines = [read_along(part, varying_dims(part)[0]) for part in parts]
    rows = [line for line in lines if line is not None]
    if not rows or len(rows) < len(lines) or len({len(row) for row in rows}) > 1:
        raise NoRuleError("splits, selects or reorders neurons")
    if not torch.equal(torch.cat(rows), torch.arange(count)):
        raise NoRuleError("splits, selects or reorders neurons")
    return torch.stack(rows)


def _lookup(line: Tensor, places: Tensor) -> Tensor:
    """Put in for every place what stands there in ``line``."""
    (small,) = narrowed(places)
    return line[small].expand(places.shape)


def _same_shape(op: Operation) -> Any:
    """One tensor in, the same tensor out as far as neurons are concerned, whatever the other arguments are."""
    if not isinstance(op.result, Tensor) or op.result.shape != op.subject.shape:
        raise NoRuleError("changes the shape of its input")
    return op.subject


def _resize(op: Operation) -> Any:
    """Interpolation over all axes behind the channels."""
    return _spatial(op.subject.dim() - 2)(op)


def _fresh(op: Operation) -> Any:
    """A new tensor that takes no more than shape, dtype or device from another."""
    return fixed(op.result.shape)


def _pad(op: Operation) -> Any:
    """Padding of axes along which the neuron is the same."""
    widths = op.args[1] if len(op.args) > 1 else op.kwargs["pad"]
    return _spatial(len(widths) // 2)(op)


_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Threshold, nn.RReLU),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)

MODULE_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_ACTIVATIONS, _same_shape),
    nn.Flatten: _move,
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d), _spatial(1)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d), _spatial(2)),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), _spatial(3)),
    **dict.fromkeys((nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d), _spatial(2)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _resize),
    nn.PReLU: _same_shape,
}

_ELEMENTWISE_NAMES = (
    *("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "neg", "abs", "exp", "log", "sqrt"),
    *("rsqrt", "square", "sigmoid", "tanh", "relu", "clamp", "clip", "erf", "sin", "cos", "where", "lerp", "round"),
)
_SAME_SHAPE_FUNCTIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign),
    *(F.sigmoid, F.tanh, F.hardsigmoid, F.hardswish, F.hardtanh, F.hardshrink, F.softshrink, F.tanhshrink),
    *(F.logsigmoid, F.threshold, F.rrelu, F.relu_, F.leaky_relu_, F.elu_, F.hardtanh_),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
)
_REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std")
_MOVES = (
    *("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "swapdims", "chunk"),
    *("split", "unbind", "narrow", "select", "flip", "roll", "unflatten", "broadcast_to"),
)

FUNCTION_RULES: dict[Any, Rule] = {
    **{getattr(torch, name): _pointwise for name in _ELEMENTWISE_NAMES},
    **{getattr(operator, name): _pointwise for name in ("add", "sub", "mul", "truediv", "pow", "neg")},
    **{getattr(operator, name): _pointwise for name in ("iadd", "isub", "imul", "itruediv")},
    **dict.fromkeys(_SAME_SHAPE_FUNCTIONS, _same_shape),
    **{getattr(torch, name): _reduce for name in _REDUCTIONS},
    **{getattr(torch, name): _move for name in _MOVES},
    operator.getitem: _move,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    F.pad: _pad,
    F.interpolate: _resize,
    **dict.fromkeys(
        (torch.zeros_like, torch.ones_like, torch.empty_like, torch.rand_like, torch.randn_like), _same_shape
    ),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), _spatial(1)),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), _spatial(2)),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d), _spatial(3)),
}

METHOD_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE_NAMES, _pointwise),
    **dict.fromkeys(
        [f"{name}_" for name in ("add", "sub", "mul", "div", "relu", "clamp", "sigmoid", "tanh")], _pointwise
    ),
    **dict.fromkeys(("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "type"), _same_shape),
    **dict.fromkeys(("to", "type_as", "cpu", "cuda", "requires_grad_"), _same_shape),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"), _fresh),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    "expand_as": _pointwise,
    **dict.fromkeys((*_MOVES, "view", "expand", "t"), _move),
}

# Calls whose whole-number arguments are sizes.
_SIZED = {
    *("view", "reshape", "expand", "unflatten", "broadcast_to", "split", "narrow"),
    *(torch.reshape, torch.unflatten, torch.broadcast_to, torch.split, torch.narrow),
}

# Functions of other packages, by their full name, so that they need not be installed.
NAMED_RULES: dict[str, Rule] = {"torchvision.ops.stochastic_depth.stochastic_depth": _same_shape}

# Rules of operations that may be called with sizes which depend on how many neurons there are.
MOVES = (_move, _cat)


def find(target: Any) -> Rule | None:
    """Return the rule of a function, a tensor method (by name) or a module, if there is one."""
    if isinstance(target, str):
        return METHOD_RULES.get(target)
    if isinstance(target, nn.Module):
        return MODULE_RULES.get(type(target))
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    return FUNCTION_RULES.get(target) or NAMED_RULES.get(name)
