"""Running neuron ids through a traced model, operation by operation."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_flat.nested import map_tensors, tensors
from kfac_flat.pruning import layers, rules
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.execution import DryRun
from kfac_flat.pruning.ids import along, compact, fixed, narrowed, varying_dims
from kfac_flat.pruning.rules import Place
from kfac_flat.pruning.tracing import Program

OUTPUT_REASON = "forms the model's output"


class FailedAtError(CutError):
    """An operation of the traced model cannot be run, or does something else than it did before a cut."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


class Propagation(DryRun):
    """Runs a traced model on tensors without data, and the ids of neurons along with them.

    Args:
        bare: A skeleton of the model, dense or cut.
        program: Its trace.
        table: Where rules report.
        stuck: Operations whose neurons are frozen whatever the rules say, with the reason.
        whole_rows: Operations that deal neurons out to rows (attention heads) which go as a whole.
        expected: Numbers that the operations of the dense model were called with; a cut must not change them, except
            where data are merely moved. None if this is the dense model.
        counts: Whether to count what is multiplied.
    """

    def __init__(
        self,
        bare: nn.Module,
        program: Program,
        table: rules.Table,
        stuck: Mapping[Place, str],
        whole_rows: Collection[Place],
        expected: Mapping[Place, Any] | None = None,
        counts: bool = True,
    ) -> None:
        super().__init__(bare, program, counts)
        self.numbers: dict[Place, Any] = {}
        self._bare = bare
        self._table, self._stuck, self._whole_rows, self._expected = table, stuck, whole_rows, expected
        self._places = {n: (program.training, i) for i, n in enumerate(program.graph.nodes)}
        self._ids: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, then its rule.

        Raises:
            FailedAtError: if either goes wrong.
        """
        try:
            result = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            cut = self._expected is not None and n.target in rules.SIZED
            advice = "; a size worked out from another layer's width cannot follow a cut, -1 can" if cut else ""
            raise FailedAtError(self._places[n], f"{described(n, self.submodules)} fails: {error}{advice}") from error
        try:
            self._ids[n] = self._follow(n, result)
        except CutError as error:
            raise FailedAtError(self._places[n], f"{described(n, self.submodules)}: {error}") from error
        self._notice_changed_shapes(n)
        return result

    def _follow(self, n: fx.Node, result: Any) -> Any:
        """Return the ids of the operation's result."""
        args, kwargs = (fx.node.map_arg(a, lambda node: self._ids[node]) for a in (n.args, n.kwargs))
        stuck = self._why_stuck(n)
        if stuck is not None:
            for ids in self._sources(n):
                self._table.freeze(ids, stuck)
            for value, attributes in self._literals(n).items():
                for attribute in attributes:
                    self._table.sized(attribute, fixed(torch.Size([value])))
        if n.op == "output":
            self._freeze(args, OUTPUT_REASON)
            return None
        if n.op == "get_attr" and n.users:
            self._table.used_elsewhere(str(n.target))
            self._compare_constant(n)
        if n.op in ("placeholder", "get_attr"):
            return map_tensors(lambda t: fixed(t.shape), result)
        if not _any_tensor(result):
            return result  # a size or a number
        if not _any_tensor((args, kwargs)):  # a new tensor, made of numbers
            self._compare_numbers(n, args, kwargs)
            return map_tensors(lambda t: fixed(t.shape), result)
        try:
            return self._apply_rule(n, args, kwargs, result)
        except rules.NoRuleError as error:
            self._freeze((args, kwargs), f"{described(n, self.submodules)} {error}")
            return map_tensors(lambda t: fixed(t.shape), result)

    def _why_stuck(self, n: fx.Node) -> str | None:
        """Return why an operation has been found to be stuck, or a tensor made by the model's code that it reads."""
        places = [self._places[m] for m in (n, *n.all_input_nodes) if m is n or m.op == "get_attr"]
        return next((self._stuck[place] for place in places if place in self._stuck), None)

    def _apply_rule(self, n: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
        target: Any = n.target
        opaque = n.target in self._program.opaque
        if n.op == "call_module":
            target = self.submodules[str(n.target)]
            layer = not opaque and (layers.has_channels(target) or self._table.is_layer(str(n.target)))
            if layer and not layers.is_attention(target) and len(args) == 1 and not kwargs:
                return rules.run_layer(self._table, str(n.target), target, args[0], result)
        rule = None if opaque else rules.find(target)
        if rule is not rules.move:
            self._compare_numbers(n, args, kwargs)
        if rule is None:
            raise rules.NoRuleError("has no rule")
        operation = self._operation(n, target, args, kwargs, result)
        if rule is not rules.move:
            return rule(operation)
        move = _Move(fx.node.map_arg((n.args, n.kwargs), lambda node: None), operation)
        self.numbers[self._places[n]] = move
        if n.target in rules.SIZED:
            self._compare_sizes(n, move)
        move.ids = rule(operation)
        if self._expected is not None and not move.does_as(self._expected[self._places[n]]):
            raise CutError("moves data to places that depend on the number of neurons")
        return move.ids

    def _operation(self, n: fx.Node, target: Any, args: Any, kwargs: Any, result: Any) -> rules.Operation:
        """Put together what rules are told of a call."""
        place = self._places[n]
        return rules.Operation(
            table=self._table,
            target=target,
            args=tuple(args),
            kwargs=dict(kwargs),
            result=result,
            name=str(n.target) if n.op == "call_module" else "",
            place=place,
            unused=_unused(n, len(result)) if isinstance(result, tuple) else frozenset(),
            whole_rows=place in self._whole_rows,
            literals=self._literals(n),
            followed={},
        )

    def _literals(self, n: fx.Node) -> dict[int, list[str]]:
        """Whole sizes written into a dense model's call, and the calling module's attributes of the same value."""
        if self._expected is not None or n.target not in rules.SIZED:
            return {}
        owner = next(reversed([path for path, _ in n.meta.get("nn_module_stack", {}).values()]), "")
        held = vars(self.module.get_submodule(owner)) if isinstance(self.module, nn.Module) else {}
        named: dict[int, list[str]] = {value: [] for value in _whole_numbers((n.args, n.kwargs))}
        for attribute, value in held.items():
            if type(value) is int and value in named:
                named[value].append(f"{owner}.{attribute}" if owner else attribute)
        return named

    def _compare_numbers(self, n: fx.Node, args: Any, kwargs: Any) -> None:
        """A number that an operation computes with must not depend on how many neurons there are."""
        place = self._places[n]
        self.numbers[place] = map_tensors(lambda t: None, (tuple(args), dict(kwargs)))
        if self._expected is not None and self._expected.get(place) != self.numbers[place]:
            raise CutError("computes with a number that depends on the number of neurons")

    def _compare_sizes(self, n: fx.Node, move: _Move) -> None:
        """A size that is written into a call is what it was, or the number of neurons that it has been found to be."""
        if self._expected is None:
            return
        before = self._expected[self._places[n]]
        followed = before.operation.followed
        now = {size: layers.channel_counts(layers.part(self._bare, name))[1] for size, name in followed.items()}
        if move.written != fx.node.map_aggregate(before.written, lambda a: now.get(a, a) if type(a) is int else a):
            raise CutError("is called with a size that depends on the number of neurons, or should and does not")

    def _compare_constant(self, n: fx.Node) -> None:
        """A tensor that the model's code makes of plain numbers must not depend on how many neurons there are."""
        constant = self._program.values.get(str(n.target))
        if constant is None:
            return
        self.numbers[self._places[n]] = constant
        if self._expected is not None and not _equal(self._expected[self._places[n]], constant):
            raise CutError("is made of numbers that depend on the number of neurons")

    def _notice_changed_shapes(self, n: fx.Node) -> None:
        """What an operation has reshaped in place is followed no further."""
        for source in n.all_input_nodes:
            value, ids = self.env.get(source), self._ids[source]
            if isinstance(value, Tensor) and isinstance(ids, Tensor) and value.shape != ids.shape:
                self._freeze(ids, f"{described(n, self.submodules)} changes the shape of its input in place")
                self._ids[source] = fixed(value.shape)

    def _sources(self, n: fx.Node) -> Iterator[Tensor]:
        """Ids of the tensors that an operation works on, or takes sizes from."""
        for source in n.all_input_nodes:
            if _any_tensor(self._ids[source]):
                yield from tensors(self._ids[source])
            else:
                yield from self._sources(source)

    def _freeze(self, values: Any, reason: str) -> None:
        for ids in tensors(values):
            self._table.freeze(ids, reason)


def described(n: fx.Node, submodules: Mapping[str, nn.Module]) -> str:
    """Name an operation as its author would."""
    if n.op == "call_module":
        return f"{n.target} ({type(submodules[str(n.target)]).__name__})"
    return f"{n.target if isinstance(n.target, str) else getattr(n.target, '__name__', n.target)}()"


@dataclass
class _Move:
    """A movement of data: the numbers written into the call, the call with its ids, and its results', if followed."""

    written: Any
    operation: rules.Operation
    ids: Any = None

    def does_as(self, dense: _Move) -> bool:
        """Tell whether what is no neuron, such as pixels, comes to lie where it did in the dense model."""
        if self._numbers() == dense._numbers() or not isinstance(self.operation.args[0], Tensor):
            return True
        if sum(1 for _ in tensors(self.ids)) != sum(1 for _ in tensors(dense.ids)):
            return False
        pairs = zip(self._places(dense), dense._places(dense), strict=True)
        return all(a[0] == b[0] and a[1] == b[1][: len(a[1])] for a, b in pairs)

    def _numbers(self) -> Any:
        return map_tensors(lambda t: None, (self.operation.args, self.operation.kwargs))

    def _places(self, dense: _Move) -> list[tuple[list[int], list[int]]]:
        """List where positions along the axes that have no neurons come out, and how many."""
        axes = set(range(dense.operation.subject.dim())) - set(varying_dims(dense.operation.subject))
        neurons, subject = [varying_dims(ids) for ids in tensors(dense.ids)], self.operation.subject
        found: list[tuple[list[int], list[int]]] = []
        for d in sorted(axes):
            moved = self.operation.on(along(torch.arange(subject.shape[d]), d, subject.shape))
            found += [_outside(part, axes) for part, axes in zip(tensors(moved), neurons, strict=True)]
        return found


def _outside(places: Tensor, neurons: list[int]) -> tuple[list[int], list[int]]:
    """Return the sizes of the axes that have no neurons, and the places found in turn."""
    sizes = [size for d, size in enumerate(places.shape) if d not in neurons]
    return sizes, torch.unique_consecutive(narrowed(compact(places))[0]).tolist()


def _any_tensor(value: Any) -> bool:
    return next(tensors(value), None) is not None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are the same, as far as they have data."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and (b.is_meta or torch.equal(a, b))


def _unused(n: fx.Node, count: int) -> frozenset[int]:
    """Return which of a call's results nothing reads."""
    taken = [user.args[1] if user.target is operator.getitem else None for user in n.users if user.users]
    if not all(isinstance(i, int) for i in taken):
        return frozenset()
    return frozenset(range(count)) - {i % count for i in taken if isinstance(i, int)}


def _whole_numbers(value: Any) -> Iterator[int]:
    """Whole numbers among arguments that were written there, not computed while tracing."""
    if type(value) is int:
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _whole_numbers(item)
    elif isinstance(value, dict):
        yield from _whole_numbers(list(value.values()))
