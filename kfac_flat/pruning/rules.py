"""What each operation does to neuron ids.

A rule gets an operation whose tensor arguments have been replaced by their ids and returns the ids of its result. What
only moves data is executed on the ids themselves. An operation without a rule is never guessed: its neurons are frozen.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat.attention import FewerHeadsAttention
from kfac_flat.nested import map_tensors
from kfac_flat.pruning import layers
from kfac_flat.pruning.ids import FIXED, along, compact, fixed, narrowed, read_along, varying_dims


class Table:
    """Where rules report what they find out about ids; this one listens to nothing, for runs that only count."""

    def tie(self, a: Tensor, b: Tensor) -> None:
        """State that the neurons at equal places (same shape) can only go together."""

    def freeze(self, ids: Tensor, reason: str) -> None:
        """State that these neurons cannot go."""

    def is_layer(self, name: str) -> bool:
        """Tell whether a module is known to have channels, though one of a single channel may not look like it."""
        return False

    def used_elsewhere(self, name: str) -> None:
        """State that a parameter or buffer is used by other code than its module's."""

    def layer(self, name: str, module: nn.Module, inputs: Tensor, positions: float) -> Tensor:
        """Note what a layer reads, channel by channel, and at how many positions; return the ids of its outputs."""
        return inputs if layers.passes_channels(module) else fixed(torch.Size([layers.channel_counts(module)[1]]))

    def dealt(self, place: Place, ids: Tensor) -> None:
        """State that an operation deals these neurons out in rows that all lose the same ones."""

    def contracted(self, ids: Tensor) -> None:
        """State that these neurons are summed over, so that rows they are dealt out in can only go as a whole."""

    def sized(self, attribute: str, ids: Tensor) -> None:
        """State that this attribute of a module (its path and name) is the number of these ids."""


# An operation of a traced model: train or eval mode, and its place in the graph.
Place: TypeAlias = tuple[bool, int]


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
        result: What the call returned, tensors without data.
        name: Name of the module, if the target is one.
        place: Where in the model the call is.
        unused: Which of its results nothing reads.
        whole_rows: Whether rows that it deals neurons out to (attention heads) are to go as a whole.
        literals: Whole numbers written into the call rather than computed from shapes, each with the attributes of the
            calling module that it may have been taken from.
        followed: Where the rule notes which of them it has found to be numbers of neurons, and of what attribute.
    """

    table: Table
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    name: str
    place: Place
    unused: frozenset[int]
    whole_rows: bool
    literals: Mapping[int, Sequence[str]]
    followed: dict[int, str]

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


def run_layer(table: Table, name: str, module: nn.Module, x: Tensor, result: Tensor) -> Tensor:
    """Read the channels of ``x`` and lay out the layer's own channels in the shape of its result."""
    dim = layers.channel_axis(module, x)
    inputs = read_along(x, dim)
    if inputs is None:
        table.freeze(x, f"{name} reads different neurons at different positions")
        inputs = fixed(torch.Size([x.shape[dim]]))
    return along(table.layer(name, module, inputs, layers.positions(module, x, result)), dim, result.shape)


_ATTENTION = inspect.signature(nn.MultiheadAttention.forward)


def _attend(op: Operation) -> Any:
    """Torch's multi-head attention: heads go whole, in all three projections and the columns that read them."""
    module, given = op.target, _ATTENTION.bind(None, *op.args, **op.kwargs).arguments
    q, k, v = (given[name] for name in ("query", "key", "value"))
    if given.get("attn_mask") is not None and given["attn_mask"].dim() > 2:
        raise NoRuleError("has a mask that differs from head to head")
    if not layers.is_attention(module):
        raise NoRuleError("has queries, keys and values of different widths, or keys and values of its own")
    if 1 not in op.unused:
        raise NoRuleError("returns attention weights that are used")
    lines = [line for line in (read_along(ids, ids.dim() - 1) for ids in (q, k, v)) if line is not None]
    if len(lines) < 3:
        raise NoRuleError("reads different neurons at different positions")
    for line in lines[1:]:  # one matrix reads all three
        op.table.tie(lines[0], line)
    applied = (q.numel() / q.shape[-1] + 2 * k.numel() / k.shape[-1]) / 3  # each matrix has its own length
    projected = op.table.layer(op.name, module, lines[0], applied)
    heads = projected[: len(projected) // 3]
    out = op.table.layer(f"{op.name}.out_proj", module.out_proj, heads, q.numel() // q.shape[-1])
    attended, weights = op.result
    return along(out, attended.dim() - 1, attended.shape), None if weights is None else fixed(weights.shape)


# ---------------------------------------------------------------- operations without channels of their own


def _pointwise(op: Operation) -> Tensor:
    """Element by element: what meets at one place goes together; what is spread over several neurons stays."""
    operands = [a for a in (*op.args, *op.kwargs.values()) if isinstance(a, Tensor)]
    full = next((ids for ids in operands if ids.shape == op.result.shape), None)
    if full is None:
        raise NoRuleError("broadcasts every operand")
    varying = set(varying_dims(full))
    if not varying and all(not varying_dims(ids) for ids in operands):
        return _one_neuron(op, operands)
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


def move(op: Operation) -> Any:
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
    line = _moved_line(op, axes[0])
    moved = map_tensors(compact, op.on(along(torch.arange(len(line)), axes[0], op.subject.shape)))
    parts = [moved] if isinstance(moved, Tensor) else list(moved)
    row, length = len(line), 1
    if not all(_in_order(part, len(line)) for part in parts):
        rows = _rows(parts, len(line))
        row = rows.shape[1]
        if op.whole_rows and len(parts) == 1:
            length, row = row, _heads(op, parts[0], line, rows)
        else:
            op.table.tie(line[rows[:1]].expand(rows.shape), line[rows])
            op.table.dealt(op.place, line)
    ids: Any = map_tensors(lambda places: _lookup(line, places, row, length), moved)
    if op.target in SIZED:
        for part in [ids] if isinstance(ids, Tensor) else ids:
            for d in varying_dims(part)[-1:]:  # an axis before it would be one of rows
                _follow_size(op, part.shape[d], part, d)
    return ids


def _moved_line(op: Operation, dim: int) -> Tensor:
    """Return the ids along an axis of what is moved, which must be the only one with neurons."""
    line = read_along(op.subject, dim)
    if line is None:
        raise NoRuleError("moves neurons that lie along two axes")
    return line


def _heads(op: Operation, places: Tensor, line: Tensor, rows: Tensor) -> int:
    """Tie the neurons of each row, and rows that differ in an axis further out (query, key and value).

    Returns:
        How many neurons lie between a neuron and its like in the next repetition of all rows.
    """
    axes = varying_dims(places)
    heads = places.shape[axes[-2]] if len(axes) > 1 else len(rows)
    apart = line[rows.reshape(-1, heads, rows.shape[1])]
    op.table.tie(apart[:1, :, :1].expand_as(apart), apart)
    return heads * rows.shape[1]


def _follow_size(op: Operation, size: int, ids: Tensor, dim: int) -> None:
    """A size that is written into the call and depends on the neurons must be an attribute that can follow them."""
    if size not in op.literals:
        return
    attributes, sized = op.literals[size], read_along(ids, dim)
    if len(attributes) != 1 or sized is None:
        held = f" and {len(attributes)} attributes of its module have that value" if attributes else ""
        raise NoRuleError(
            f"has a size that depends on the neurons, {size}, written into it{held}: -1, or chunk() for split(), "
            "can follow"
        )
    op.table.sized(attributes[0], sized)
    op.followed[size] = attributes[0]


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
    if len(parts) == 1 and len(axes := varying_dims(parts[0])) > 1:
        dealt = parts[0][tuple(slice(None) if d in axes else 0 for d in range(parts[0].dim()))]
        lines = list(dealt.reshape(-1, dealt.shape[-1]))
    elif all(len(varying_dims(part)) == 1 for part in parts):
        lines = [read_along(part, varying_dims(part)[0]) for part in parts]
    rows = [line for line in lines if line is not None]
    if not rows or len(rows) < len(lines) or len({len(row) for row in rows}) > 1:
        raise NoRuleError("splits, selects or reorders neurons")
    if not torch.equal(torch.cat(rows), torch.arange(count)):
        raise NoRuleError("splits, selects or reorders neurons")
    return torch.stack(rows)


def _lookup(line: Tensor, places: Tensor, row: int, length: int) -> Tensor:
    """Put in for every place what stands there in ``line``: in its first row, at the beginning of each ``length``."""
    (small,) = narrowed(places)
    return line[small % row // length * length].expand(places.shape)


def _contraction(op: Operation, operands: Sequence[Tensor], axes: Sequence[str], result: str) -> Tensor:
    """A sum of products, axes named by letters: neurons may lie along one axis, which is not summed over."""
    along_axes = {letters[d] for ids, letters in zip(operands, axes, strict=True) for d in varying_dims(ids)}
    if not along_axes:
        return _one_neuron(op, operands)
    if len(along_axes) > 1 or not along_axes <= set(result):
        for ids in operands:
            op.table.contracted(ids)
        raise NoRuleError("sums over, or multiplies, different neurons")
    (letter,) = along_axes
    lines = []
    for ids, letters in zip(operands, axes, strict=True):
        d = letters.find(letter)
        if d >= 0 and ids.shape[d] > 1:
            lines += [line for line in [read_along(ids, d)] if line is not None]
        else:
            op.table.freeze(ids, "multiplies several other neurons at once")
    for line in lines[1:]:
        op.table.tie(lines[0], line)
    return along(lines[0], result.index(letter), op.result.shape)


def _one_neuron(op: Operation, operands: Sequence[Tensor]) -> Tensor:
    """Tensors each of which is one neuron (the last head or channel that is left), or none, throughout.

    What is no neuron has been spread over all of them while there were several.
    """
    each = [ids[(0,) * ids.dim()] for ids in operands if ids.numel()]
    neurons = [i for i in each if int(i) != FIXED]
    for i in neurons[1:]:
        op.table.tie(neurons[0], i)
    return neurons[0].expand(op.result.shape) if neurons else fixed(op.result.shape)


_BATCH_AXES = "abcdefgh"


def _matmul(op: Operation) -> Tensor:
    """Matrix products of batches: heads, which lie along a batch axis, stay apart."""
    a, b = _factors(*op.args, **op.kwargs)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise NoRuleError("is not called on tensors")
    (a_batch, a_own), (b_batch, b_own) = (_batch_axes(t, own) for t, own in ((a, "mk"), (b, "kn")))
    if b.dim() == 1:
        b_own = "k"
    batch = max(a_batch, b_batch, key=len)
    return _contraction(op, (a, b), (a_batch + a_own, b_batch + b_own), batch + (a_own + b_own).replace("k", ""))


def _factors(input: Any = None, other: Any = None, *, mat2: Any = None) -> tuple[Any, Any]:
    """Sort out the arguments of matrix products by the names that torch gives them."""
    return input, mat2 if other is None else other


def _batch_axes(t: Tensor, own: str) -> tuple[str, str]:
    """Name the axes of a batch of matrices: those of the batch, aligned at the right, and the last two."""
    if t.dim() < 2:
        return "", own[-1:]
    if t.dim() - 2 > len(_BATCH_AXES):
        raise NoRuleError("has more axes than are followed")
    return _BATCH_AXES[len(_BATCH_AXES) - (t.dim() - 2) :], own


def _einsum(op: Operation) -> Tensor:
    """Products written with letters."""
    equation, *operands = op.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    sides = str(equation).replace(" ", "").split("->")
    axes = sides[0].split(",")
    if len(sides) != 2 or "." in sides[0] or any(len(set(letters)) < len(letters) for letters in axes):
        raise NoRuleError("is followed only if it names every axis, each once, and the result's after an arrow")
    return _contraction(op, operands, axes, sides[1])


def _attention(op: Operation) -> Tensor:
    """Scaled dot products: heads lie along a batch axis; keys and values may have fewer, each for several queries."""
    q, k, v, mask = _queries(*op.args, **op.kwargs)
    if op.kwargs.get("enable_gqa") and k.shape[-3] != q.shape[-3]:
        k, v = (ids.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for ids in (k, v))
    operands = [q, k, v] if mask is None else [q, k, v, mask]
    axes = ["".join(_batch_axes(t, own)) for t, own in zip(operands, ("tk", "sk", "sv", "ts"), strict=False)]
    return _contraction(op, operands, axes, axes[0][:-1] + "v")


def _queries(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> tuple[Any, ...]:
    """Sort out the arguments of ``scaled_dot_product_attention`` by the names that torch gives them."""
    return query, key, value, attn_mask


def _normalised(op: Operation) -> Tensor:
    """Softmax and the like over one axis, along which the neuron is the same."""
    module = isinstance(op.target, nn.Module)
    dim = op.target.dim if module else op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    if not isinstance(dim, int) or dim % op.subject.dim() in varying_dims(op.subject):
        raise NoRuleError("normalises over different neurons")
    return op.subject


def _layer_norm(op: Operation) -> Tensor:
    """Statistics over the last axes, which would be others without some of the neurons that lie there."""
    ids, module = op.subject, isinstance(op.target, nn.Module)
    over = op.target.normalized_shape if module else op.args[1] if len(op.args) > 1 else op.kwargs["normalized_shape"]
    if any(d >= ids.dim() - len(over) for d in varying_dims(ids)):
        op.table.contracted(ids)
        raise NoRuleError("takes its statistics over all neurons")
    return ids


def _pixel_shuffle(op: Operation) -> Tensor:
    """Each output channel is woven from a block of input channels, which goes as a whole."""
    factor = op.target.upscale_factor if isinstance(op.target, nn.PixelShuffle) else _factor(*op.args, **op.kwargs)
    blocks = _moved_line(op, op.subject.dim() - 3).reshape(-1, factor**2)
    op.table.tie(blocks[:, :1].expand_as(blocks), blocks)
    return along(blocks[:, 0].contiguous(), op.result.dim() - 3, op.result.shape)


def _pixel_unshuffle(op: Operation) -> Tensor:
    """Each channel becomes a block of channels."""
    factor = op.target.downscale_factor if isinstance(op.target, nn.PixelUnshuffle) else _factor(*op.args, **op.kwargs)
    line = _moved_line(op, op.subject.dim() - 3)
    return along(line.repeat_interleave(factor**2), op.result.dim() - 3, op.result.shape)


def _factor(input: Any = None, upscale_factor: int | None = None, downscale_factor: int | None = None, **_: Any) -> int:
    """Read the factor off the arguments of ``pixel_shuffle`` or ``pixel_unshuffle``."""
    factor = upscale_factor if downscale_factor is None else downscale_factor
    if factor is None:
        raise NoRuleError("is called without a factor")
    return factor


def _record(op: Operation) -> Any:
    """Several results under names."""
    return op.target(*op.args, **op.kwargs)


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


MODULE_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(layers.ACTIVATIONS, _same_shape),
    nn.Flatten: move,
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.LPPool1d), _spatial(1)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d), _spatial(2)),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), _spatial(3)),
    **dict.fromkeys((nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d), _spatial(2)),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _resize),
    nn.PReLU: _same_shape,
    nn.MultiheadAttention: _attend,
    FewerHeadsAttention: _attend,
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _normalised),
    nn.LayerNorm: _layer_norm,
    nn.PixelShuffle: _pixel_shuffle,
    nn.PixelUnshuffle: _pixel_unshuffle,
}

_ELEMENTWISE_NAMES = (
    *("add", "sub", "mul", "div", "true_divide", "pow", "maximum", "minimum", "neg", "abs", "exp", "log", "sqrt"),
    *("rsqrt", "square", "sigmoid", "tanh", "relu", "clamp", "clip", "erf", "sin", "cos", "where", "lerp", "round"),
    "masked_fill",
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
    **{getattr(torch, name): move for name in _MOVES},
    operator.getitem: move,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    **dict.fromkeys((torch.matmul, torch.bmm, operator.matmul), _matmul),
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.softmax, torch.log_softmax, F.softmax, F.log_softmax), _normalised),
    **dict.fromkeys((torch.pixel_shuffle, F.pixel_shuffle), _pixel_shuffle),
    **dict.fromkeys((torch.pixel_unshuffle, F.pixel_unshuffle), _pixel_unshuffle),
    **dict.fromkeys((torch.layer_norm, F.layer_norm), _layer_norm),
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
    **dict.fromkeys(("matmul", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(("softmax", "log_softmax"), _normalised),
    **dict.fromkeys((*_MOVES, "view", "expand", "t"), move),
}

# Calls whose whole-number arguments are sizes.
SIZED = {
    *("view", "reshape", "expand", "unflatten", "broadcast_to", "split", "narrow"),
    *(torch.reshape, torch.unflatten, torch.broadcast_to, torch.split, torch.narrow),
}

# Functions of other packages, by their full name, so that they need not be installed.
NAMED_RULES: dict[str, Rule] = {"torchvision.ops.stochastic_depth.stochastic_depth": _same_shape}

# Rules that users have registered for modules of their own, by the exact class (``registration.py``).
REGISTERED_MODULES: dict[type[nn.Module], Rule] = {}

# Rules of operations that multiply activations with each other.
PRODUCTS = (_matmul, _einsum, _attention, _attend)

# Rules of operations that may be called with sizes which depend on how many neurons there are.
MOVES = (move, _cat)


def find(target: Any) -> Rule | None:
    """Return the rule of a function, a tensor method (by name) or a module, if there is one."""
    if isinstance(target, str):
        return METHOD_RULES.get(target)
    if isinstance(target, nn.Module):
        return MODULE_RULES.get(type(target)) or _registered(target)
    if isinstance(target, type) and issubclass(target, tuple):
        return _record
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    operator_of_all_overloads = getattr(target, "overloadpacket", target)
    return FUNCTION_RULES.get(target) or FUNCTION_RULES.get(operator_of_all_overloads) or NAMED_RULES.get(name)


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one operation, whose code is not looked into: it has channels, or a registered rule."""
    return layers.has_channels(module) or _registered(module) is not None


def _registered(module: nn.Module) -> Rule | None:
    """Return the rule that a user has registered for the module's class, unless a cut might have to reach inside."""
    rule = REGISTERED_MODULES.get(type(module))
    if rule is None:
        return None
    holds_scalars_only = all(t.numel() == 1 for t in (*module.parameters(), *module.buffers()))
    return rule if holds_scalars_only else None


def keeps_shape(target: Any) -> bool:
    """Tell whether a call returns its first argument changed in nothing but its numbers, such as dropout."""
    return find(target) is _same_shape


def changes_no_shape(module: nn.Module, x: Tensor) -> bool:
    """Tell whether a module is known to accept this input and return as large a tensor: activations and norms."""
    if isinstance(module, nn.LayerNorm) and find(module) is not None:
        return tuple(x.shape[-len(module.normalized_shape) :]) == tuple(module.normalized_shape)
    if layers.passes_channels(module):
        dim = layers.channel_axis(module, x)
        return 0 < dim < x.dim() and x.shape[dim] == layers.channel_counts(module)[1]
    return keeps_shape(module)


def same_as_result(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the argument whose shape and type a function is known to return, if there is one."""
    if not args or not isinstance(args[0], Tensor) or kwargs:
        return None
    if target in _SAME_SHAPE_FUNCTIONS:
        return args[0]
    operands = [a for a in args if isinstance(a, Tensor)]
    full = max(operands, key=lambda t: (t.numel(), t.dim()))
    pointwise = find(target) is _pointwise and full.is_floating_point()
    return full if pointwise and all(t.dtype == full.dtype and _broadcasts(t, full) for t in operands) else None


def _broadcasts(t: Tensor, full: Tensor) -> bool:
    """Tell whether a tensor is repeated along axes of another one at most, where they meet."""
    pairs = zip(reversed(t.shape), reversed(full.shape), strict=False)
    return t.dim() <= full.dim() and all(size in (1, whole) for size, whole in pairs)
