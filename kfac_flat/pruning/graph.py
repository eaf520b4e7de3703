"""Which neurons must go together: groups of output channels tied by what reads and combines them.

The traced model runs once in train and once in eval mode on tensors without data, and the ids of neurons run along
(``ids.py``, ``rules.py``). Two neurons that meet in an addition are tied; a neuron that reaches the model's output, or
an operation that no rule covers, is frozen. The same run, after a cut, proves that every layer reads exactly the
neurons it should.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_flat.nested import batch_size, map_tensors, tensors
from kfac_flat.pruning import rules
from kfac_flat.pruning.ids import FIXED, components, fixed
from kfac_flat.pruning.tracing import skeleton, trace

OUTPUT_REASON = "forms the model's output"


class CutError(RuntimeError):
    """A cut would not leave a model that computes what it should; nothing has been changed."""


@dataclass(frozen=True)
class Channels:
    """The group of each channel of a module, :data:`FIXED` where it cannot go.

    Attributes:
        inputs: ``[C_in]``.
        outputs: ``[C_out]``.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class ExampleInputs:
    """How the model is called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> ExampleInputs:
        """Read a tensor, a tuple of positional or a dict of keyword arguments, leaving the data behind."""
        if isinstance(example_inputs, dict):
            return cls((), _without_data(example_inputs))
        if isinstance(example_inputs, tuple):
            return cls(_without_data(example_inputs), {})
        return cls((_without_data(example_inputs),), {})


class NeuronGraph:
    """The groups of neurons of a model.

    Args:
        model: The model, free of wrappers. It is neither run nor changed.
        example_inputs: What it is called with; values do not matter.
        ignore: Modules whose neurons stay, by name, with the reason.

    Attributes:
        channels: The groups of every module that has channels, by name.
        producers: Names of the modules whose output channels are neurons: Linear and convolutions.
        hidden: Those whose outputs do not form the model's output.
        consumers: Those that read neurons; a depthwise convolution goes with what it reads.
        frozen: For each producer (Linear, convolution) with neurons that cannot go, by name, the first reason.

    Raises:
        ValueError: if the model cannot be traced or does not run on the example inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, ignore: Mapping[str, str] | None = None) -> None:
        self._inputs = ExampleInputs.of(example_inputs)
        bare = skeleton(model)
        self._trace(bare)
        table = _Grouping(bare)
        for training in self._modes:
            self._run(bare, table, training)
        for name, reason in (ignore or {}).items():
            if name in table.outputs:
                table.freeze(table.outputs[name], reason)
        self.channels, self.frozen = table.groups()
        self.producers = [name for name in self.channels if rules.is_producer(model.get_submodule(name))]
        self.hidden = [name for name in self.producers if self.frozen.get(name) != OUTPUT_REASON]
        self.consumers = [name for name in self.producers if not rules.is_depthwise(model.get_submodule(name))]

    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of one example in eval mode, by torch's own counter; biases and norms not counted."""
        with FlopCounterMode(display=False) as counter:
            self._run(skeleton(model), _Silent(), training=False)
        return int(counter.get_total_flops()) // (2 * max(1, batch_size((self._inputs.args, self._inputs.kwargs))))

    def verify(self, pruned: nn.Module, channels: Mapping[str, Channels]) -> None:
        """Prove on a skeleton that has been cut that each module reads exactly the neurons it should.

        Raises:
            CutError: if one does not, or the model no longer runs.
        """
        for training in self._modes:
            try:
                self._run(pruned, _Verification(channels), training)
            except ValueError as error:
                raise CutError(f"the pruned model would not run: {error}") from error

    def _trace(self, bare: nn.Module) -> None:
        """Trace both modes; one is enough where they are the same."""
        train, evaluate = (trace(bare.train(training), rules.has_channels) for training in (True, False))
        self._traces = {True: train, False: evaluate}
        self._modes = (False,) if str(train) == str(evaluate) else (True, False)
        # Tensors made in forward() become attributes of the traced copy; every other copy needs them as well.
        self._constants = {
            name: _without_data(value) for name, value in vars(bare).items() if name.startswith("_tensor_constant")
        }

    def _run(self, bare: nn.Module, table: rules.Table, training: bool) -> None:
        bare.train(training)
        for module in bare.modules():
            if isinstance(module, rules.BATCH_NORMS):
                module.eval()  # its channels are the same, and it would refuse a single example
        vars(bare).update(self._constants)
        graph = self._traces[training]
        _Propagation(bare, graph, table).run(*_bind(graph, self._inputs))


class _Propagation(fx.Interpreter):
    """Runs a traced model on tensors without data, and the ids of neurons along with them."""

    def __init__(self, module: nn.Module, graph: fx.Graph, table: rules.Table) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # errors here are the user's, and say which operation they concern
        self._table = table
        self._ids: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation, then its rule."""
        try:
            with torch.device("meta"), torch.no_grad():
                result = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise ValueError(
                f"the model does not run on example_inputs, at {n.format_node()}: {error}. Give what the model is "
                "called with: a tensor, a tuple of positional or a dict of keyword arguments"
            ) from error
        self._ids[n] = self._ids_of(n, result)
        return result

    def _ids_of(self, n: fx.Node, result: Any) -> Any:
        args, kwargs = (fx.node.map_arg(a, lambda node: self._ids[node]) for a in (n.args, n.kwargs))
        if n.op == "output":
            self._freeze(args, OUTPUT_REASON)
            return None
        if n.op == "get_attr":
            self._pin_owner(str(n.target))
        if n.op in ("placeholder", "get_attr") or not any(True for _ in tensors((args, kwargs))):
            return map_tensors(lambda t: fixed(t.shape), result)
        try:
            return self._apply_rule(n, args, kwargs, result)
        except rules.NoRuleError as error:
            self._freeze((args, kwargs), f"{_describe(n, self.submodules)} {error}")
            return map_tensors(lambda t: fixed(t.shape), result)

    def _apply_rule(self, n: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
        if not any(True for _ in tensors(result)):
            return result  # a size or a number
        target: Any = n.target
        if n.op == "call_module":
            target = self.submodules[str(n.target)]
            if rules.has_channels(target) and len(args) == 1:
                return rules.run_layer(self._table, str(n.target), target, args[0], result)
            rule = rules.MODULE_RULES.get(type(target))
        else:
            rule = (rules.METHOD_RULES if n.op == "call_method" else rules.FUNCTION_RULES).get(target)
        if rule is None:
            raise rules.NoRuleError("has no rule")
        return rule(rules.Operation(self._table, target, tuple(args), dict(kwargs), _literals(n), result))

    def _freeze(self, values: Any, reason: str) -> None:
        for ids in tensors(values):
            self._table.freeze(ids, reason)

    def _pin_owner(self, target: str) -> None:
        """A parameter that is used outside its module must stay as it is."""
        owner, _, _ = target.rpartition(".")
        if isinstance(self._table, _Grouping) and owner in self.submodules:
            self._table.pinned.setdefault(owner, f"{target} is used outside its module")


class _Grouping(rules.Table):
    """Hands out ids and collects who is tied to whom."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._next = FIXED + 1
        self._pairs: list[Tensor] = []
        self._reasons: dict[int, str] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.pinned: dict[str, str] = {}

    def tie(self, a: Tensor, b: Tensor) -> None:
        self._pairs.append(torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1))

    def freeze(self, ids: Tensor, reason: str) -> None:
        present = torch.unique(ids)
        for i in present.tolist():
            self._reasons.setdefault(i, reason)
        self._pairs.append(torch.stack([present, torch.full_like(present, FIXED)]))

    def layer(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        if name in self.inputs:  # called again: position i reads, and is, the same neuron both times
            self.tie(self.inputs[name], inputs)
            return self.outputs[name]
        if isinstance(module, rules.BATCH_NORMS):
            outputs = inputs
        else:
            size = rules.channel_counts(module)[1]
            outputs = torch.arange(self._next, self._next + size)
            self._next += size
            self._tie_groups(module, inputs, outputs)
        self.inputs[name], self.outputs[name] = inputs, outputs
        return outputs

    def _tie_groups(self, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        groups = int(getattr(module, "groups", 1))
        if rules.is_depthwise(module):
            self.tie(outputs, inputs.repeat_interleave(len(outputs) // len(inputs)))
        elif groups > 1:  # every group loses the same ones, so that they stay of one size
            for ids in (inputs.reshape(groups, -1), outputs.reshape(groups, -1)):
                self.tie(ids[:1].expand_as(ids), ids)

    def groups(self) -> tuple[dict[str, Channels], dict[str, str]]:
        """Return the group of every channel, and why producers have frozen ones."""
        self._tie_shared_parameters()
        for name, reason in self.pinned.items():
            if name in self.inputs:
                self.freeze(torch.cat([self.inputs[name], self.outputs[name]]), reason)
        labels = components(self._next, torch.cat([torch.zeros(2, 0, dtype=torch.long), *self._pairs], 1))
        channels = {name: Channels(labels[self.inputs[name]], labels[self.outputs[name]]) for name in self.inputs}
        frozen = {}
        for name, c in channels.items():
            stuck = self.outputs[name][c.outputs == FIXED].tolist()
            if stuck and rules.is_producer(self._model.get_submodule(name)):
                reasons = (self._reasons[i] for i in stuck if i in self._reasons)
                frozen[name] = next(reasons, "goes together with neurons that cannot go")
        return channels, frozen

    def _tie_shared_parameters(self) -> None:
        """Modules that share a parameter are cut alike; a parameter shared with a module unknown here is not cut."""
        holders: dict[int, list[str]] = {}
        for name, module in self._model.named_modules():
            for p in module._parameters.values():
                if p is not None:
                    holders.setdefault(id(p), []).append(name)
        for names in holders.values():
            known = [name for name in names if name in self.inputs]
            if len(known) < len(names):
                for name in known:
                    self.pinned.setdefault(name, f"shares a parameter with {(set(names) - set(known)).pop()}")
            for name in known[1:]:
                for ids in (self.inputs, self.outputs):
                    if ids[name].shape == ids[known[0]].shape:
                        self.tie(ids[known[0]], ids[name])
                    else:
                        self.pinned[name] = self.pinned[known[0]] = f"{name} and {known[0]} share a parameter"


class _Silent(rules.Table):
    """Listens to nothing; for runs that only count."""

    def tie(self, a: Tensor, b: Tensor) -> None: ...

    def freeze(self, ids: Tensor, reason: str) -> None: ...

    def layer(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        return inputs if isinstance(module, rules.BATCH_NORMS) else torch.arange(rules.channel_counts(module)[1])


class _Verification(rules.Table):
    """Knows what each layer of a cut model should read, and checks that it does."""

    def __init__(self, channels: Mapping[str, Channels]) -> None:
        self._channels = channels

    def tie(self, a: Tensor, b: Tensor) -> None:
        if not torch.equal(a.flatten(), b.flatten()):
            raise CutError("after the cut, different neurons would meet in one operation")

    def freeze(self, ids: Tensor, reason: str) -> None:
        if bool((ids != FIXED).any()):
            raise CutError(f"after the cut, {reason}")

    def layer(self, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
        if not torch.equal(self._channels[name].inputs, inputs):
            raise CutError(f"after the cut, {name} would read other neurons than it should")
        return self._channels[name].outputs


def _bind(graph: fx.Graph, inputs: ExampleInputs) -> Iterator[Any]:
    """Arguments in the order of the traced placeholders; those that are not given keep their defaults."""
    positional = list(inputs.args)
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("**"):
            yield dict(inputs.kwargs)
        elif name.startswith("*"):
            yield tuple(positional)
            positional = []
        elif positional:
            yield positional.pop(0)
        elif name in inputs.kwargs:
            yield inputs.kwargs[name]
        elif node.args:
            yield node.args[0]
        else:
            raise ValueError(f"example_inputs lack the model's argument {name!r}")


def _literals(n: fx.Node) -> frozenset[int]:
    """Whole numbers in a call's arguments that were written there, not computed while tracing."""
    found: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            visit(list(value.values()))

    visit((n.args, n.kwargs))
    return frozenset(found)


def _describe(n: fx.Node, submodules: Mapping[str, nn.Module]) -> str:
    """Name an operation as its author would."""
    if n.op == "call_module":
        return f"{n.target} ({type(submodules[str(n.target)]).__name__})"
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
    return f"{name}()"


def _without_data(value: Any) -> Any:
    return map_tensors(lambda t: torch.empty_like(t, device="meta"), value)
