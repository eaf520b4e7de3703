"""Running neuron ids through a traced model, operation by operation."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_flat.nested import map_tensors, tensors
from kfac_flat.pruning import rules
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.ids import fixed
from kfac_flat.pruning.rules import Place
from kfac_flat.pruning.tracing import Program, without_data

OUTPUT_REASON = "forms the model's output"


class FailedAtError(CutError):
    """An operation of the traced model cannot be run, or does something else than it did before a cut."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


class Propagation(fx.Interpreter):
    """Runs a traced model on tensors without data, and the ids of neurons along with them.

    Args:
        bare: A skeleton of the model, dense or cut.
        program: Its trace.
        table: Where rules report.
        stuck: Operations whose neurons are frozen whatever the rules say, with the reason.
        whole_rows: Operations that deal neurons out to rows (attention heads) which go as a whole.
        expected: Numbers that the operations of the dense model were called with; a cut must not change them, except
            where data are merely moved. None if this is the dense model.
    """

    def __init__(
        self,
        bare: nn.Module,
        program: Program,
        table: rules.Table,
        stuck: Mapping[Place, str],
        whole_rows: Collection[Place],
        expected: Mapping[Place, Any] | None = None,
    ) -> None:
        super().__init__(_prepared(bare, program), graph=program.graph)
        self.extra_traceback = False  # errors here are the user's, and say which operation they concern
        self.numbers: dict[Place, Any] = {}
        self.flops = 0
        self._program, self._table, self._stuck, self._whole_rows, self._expected = (
            *(program, table, stuck),
            *(whole_rows, expected),
        )
        self._places = {n: (program.training, i) for i, n in enumerate(program.graph.nodes)}
        self._ids: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, then its rule.

        Raises:
            FailedAtError: if either goes wrong.
        """
        try:
            with self._conditions(n):
                result = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise FailedAtError(self._places[n], f"{self._describe(n)} fails: {error}") from error
        try:
            self._ids[n] = self._follow(n, result)
        except CutError as error:
            raise FailedAtError(self._places[n], f"{self._describe(n)}: {error}") from error
        self._notice_changed_shapes(n)
        return result

    @contextlib.contextmanager
    def _conditions(self, n: fx.Node) -> Iterator[None]:
        """Let a call make tensors without data and count what it multiplies: where there is need, as both take time."""
        if n.op in ("get_attr", "output", "placeholder"):
            yield
            return
        target = self.submodules[str(n.target)] if n.op == "call_module" else n.target
        layer = isinstance(target, nn.Module) and rules.has_channels(target)
        rule = rules.find(target)
        given = any(isinstance(self.env.get(source), Tensor) for source in n.all_input_nodes)
        with contextlib.ExitStack() as stack:
            if not (layer or (rule is not None and given)):
                stack.enter_context(torch.device("meta"))
            if (rule is None and not layer) or rule in rules.PRODUCTS:
                counter = stack.enter_context(FlopCounterMode(display=False))
                stack.callback(lambda: self._count(counter))
            yield

    def _count(self, counter: FlopCounterMode) -> None:
        self.flops += int(counter.get_total_flops())

    def fetch_attr(self, target: str) -> Any:
        """Look up a parameter, buffer, or tensor that was made while tracing."""
        return self._program.constants[target] if target in self._program.constants else super().fetch_attr(target)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a submodule, if need be; one that could not be traced runs on zeros, for the shape of its result."""
        real = self._program.opaque.get(target)
        if real is None:
            if len(args) == 1 and not kwargs and rules.changes_no_shape(self.submodules[target], args[0]):
                return torch.empty_like(args[0])  # norms without data take longer than with
            result = super().call_module(target, args, kwargs)
            module = self.submodules[target]
            if rules.is_producer(module) and not rules.is_attention(module):
                self.flops += 2 * rules.positions(module, args[0], result) * rules.weight_of(module).numel()
            return result
        device = next((t.device for t in (*real.parameters(), *real.buffers())), torch.device("cpu"))
        zeros = map_tensors(lambda t: torch.zeros_like(t, device=device), (args, kwargs))
        with torch.device(device), torch.random.fork_rng(devices=[]):
            return without_data(real.eval()(*zeros[0], **zeros[1]))

    def _follow(self, n: fx.Node, result: Any) -> Any:
        """Return the ids of the operation's result."""
        args, kwargs = (fx.node.map_arg(a, lambda node: self._ids[node]) for a in (n.args, n.kwargs))
        stuck = self._stuck.get(self._places[n])
        if stuck is not None:
            for ids in self._sources(n):
                self._table.freeze(ids, stuck)
        if n.op == "output":
            self._freeze(args, OUTPUT_REASON)
            return None
        if n.op == "get_attr" and n.users:
            self._table.used_elsewhere(str(n.target))
        if n.op in ("placeholder", "get_attr") or not _any_tensor((args, kwargs)):
            return map_tensors(lambda t: fixed(t.shape), result)
        if not _any_tensor(result):
            return result  # a size or a number
        try:
            return self._apply_rule(n, args, kwargs, result)
        except rules.NoRuleError as error:
            self._freeze((args, kwargs), f"{self._describe(n)} {error}")
            return map_tensors(lambda t: fixed(t.shape), result)

    def _apply_rule(self, n: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
        target: Any = n.target
        if n.op == "call_module":
            target = self.submodules[str(n.target)]
            layer = rules.has_channels(target) or self._table.is_layer(str(n.target))
            if layer and not rules.is_attention(target) and len(args) == 1 and not kwargs:
                return rules.run_layer(self._table, str(n.target), target, args[0], result)
        rule = None if n.target in self._program.opaque else rules.find(target)
        if rule not in rules.MOVES:
            self._compare_numbers(n, args, kwargs)
        if rule is None:
            raise rules.NoRuleError("has no rule")
        return rule(self._operation(n, target, args, kwargs, result))

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
            literals={} if self._expected is not None else self._literals(n),
        )

    def _literals(self, n: fx.Node) -> dict[int, list[str]]:
        """Whole numbers written into a call, and the attributes of the calling module that have the same value."""
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

    def _notice_changed_shapes(self, n: fx.Node) -> None:
        """What an operation has reshaped in place is followed no further."""
        for source in n.all_input_nodes:
            value, ids = self.env.get(source), self._ids[source]
            if isinstance(value, Tensor) and isinstance(ids, Tensor) and value.shape != ids.shape:
                self._freeze(ids, f"{self._describe(n)} changes the shape of its input in place")
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

    def _describe(self, n: fx.Node) -> str:
        """Name an operation as its author would."""
        if n.op == "call_module":
            return f"{n.target} ({type(self.submodules[str(n.target)]).__name__})"
        return f"{n.target if isinstance(n.target, str) else getattr(n.target, '__name__', n.target)}()"


def _prepared(bare: nn.Module, program: Program) -> nn.Module:
    """Put a skeleton into the mode of the trace."""
    bare.train(program.training)
    for module in bare.modules():
        if isinstance(module, (*rules.BATCH_NORMS, *rules.INSTANCE_NORMS)):
            module.eval()  # its channels are the same, and it would refuse a single example
    return bare


def _any_tensor(value: Any) -> bool:
    return next(tensors(value), None) is not None


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
