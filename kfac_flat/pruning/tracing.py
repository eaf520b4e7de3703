"""From a model to the graph of its operations, with torch.fx, on a copy without data."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_flat.nested import batch_size, map_tensors, tensors
from kfac_flat.pruning.hooks import unseen_code
from kfac_flat.structure import structural_copy
from kfac_flat.warn import warn_user


def without_data(value: Any) -> Any:
    """Replace every tensor in ``value`` by one that has its shape and no data; runs on these cost next to nothing."""
    return map_tensors(empty, value)


def empty(t: Tensor) -> Tensor:
    """Return a tensor without data that lies in memory as ``t`` does."""
    if t.layout == torch.strided and t.is_contiguous():  # ten times as fast where t has no data either
        return torch.empty(t.shape, dtype=t.dtype, device="meta")
    return torch.empty_like(t, device="meta")


def skeleton(model: nn.Module) -> nn.Module:
    """Copy the model's structure with tensors that have no data."""

    def bare(t: Tensor) -> Tensor:
        empty: Tensor = without_data(t)
        return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty

    return structural_copy(model, bare)


@dataclass(frozen=True)
class ExampleInputs:
    """How the model is called, without data."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example_inputs: Any) -> ExampleInputs:
        """Read a tensor, a tuple of positional or a dict of keyword arguments."""
        if isinstance(example_inputs, dict):
            return cls((), without_data(example_inputs))
        if isinstance(example_inputs, tuple):
            return cls(without_data(example_inputs), {})
        return cls((without_data(example_inputs),), {})

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor, 1 if there is none."""
        return batch_size((self.args, self.kwargs)) or 1

    def doubled(self) -> ExampleInputs:
        """Return what a batch twice as large looks like, as far as a first axis of this length is one of examples."""

        def twice(t: Tensor) -> Tensor:
            return torch.cat([t, t]) if t.dim() and len(t) == self.batch_size else t

        return ExampleInputs(map_tensors(twice, self.args), map_tensors(twice, self.kwargs))

    def arguments(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments that hold tensors, by the position or name that they are given at.

        Raises:
            ValueError: if the function takes other arguments.
        """
        signature = inspect.signature(forward)
        try:
            signature.bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise ValueError(f"example_inputs do not fit the model's arguments {signature}: {error}") from error
        given = {f"input_{i}": value for i, value in enumerate(self.args)} | self.kwargs
        return {name: value for name, value in given.items() if next(tensors(value), None) is not None}


@dataclass
class Program:
    """A traced model in one mode.

    Attributes:
        graph: Its operations.
        training: Train or eval mode.
        constants: Tensors made while tracing, which every copy of the model needs as attributes.
        values: Those tensors as the model's code made them, with data.
        asks: Whether the model's code asked for what only its inputs tell, such as a size, or looked it up in a set or
            dict; if not, all inputs lead to the same trace.
        opaque: Submodules that cannot be traced, with data, by name: only running them tells the shape of their output.
    """

    graph: fx.Graph
    training: bool
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    asks: bool = True
    opaque: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        bare: nn.Module,
        inputs: ExampleInputs,
        training: bool,
        is_known: Callable[[nn.Module], bool],
        opaque: Collection[str],
    ) -> Program:
        """Trace a skeleton that is called with these inputs.

        Raises:
            UntraceableError: if a submodule, or the model's own forward, cannot be traced.
        """
        tracer = _Tracer(inputs, is_known, opaque)
        before = set(vars(bare))
        grad = torch.set_grad_enabled(training)  # as trained, and as used
        with grad, torch.random.fork_rng(devices=[]):  # noise is no neuron's: it is to be the same in every trace
            torch.default_generator.manual_seed(0)
            try:
                graph = tracer.trace(bare.train(training))
            except _TRACE_ERRORS as error:
                failed = tracer.failed
                try:  # a buffer cut to a size of the input, such as mask[:T, :T], is followed only as an operation
                    if not isinstance(error, TypeError):
                        raise
                    tracer = _Tracer(inputs, is_known, opaque, buffers=True)
                    graph = tracer.trace(bare)
                except _TRACE_ERRORS:  # what went wrong at first says more
                    raise UntraceableError(failed, str(error)) from error
        made = {name: vars(bare).pop(name) for name in set(vars(bare)) - before}
        return cls(graph, training, {name: without_data(value) for name, value in made.items()}, made, tracer.asked)

    def same_as(self, other: Program, keeps_shape: Callable[[Any], bool]) -> bool:
        """Tell whether both modes do the same, as far as neurons are concerned.

        Args:
            other: The other mode.
            keeps_shape: Tells calls that return their first argument changed in nothing but its numbers.
        """
        pairs = zip(self.graph.nodes, other.graph.nodes, strict=False)
        return len(self.graph.nodes) == len(other.graph.nodes) and all(
            (a.op, a.target, str(a.all_input_nodes)) == (b.op, b.target, str(b.all_input_nodes))
            and (str((a.args, a.kwargs)) == str((b.args, b.kwargs)) or keeps_shape(a.target))
            for a, b in pairs
        )


def wiring(n: fx.Node) -> Any:
    """Name the results that an operation reads, argument by argument."""
    return fx.node.map_aggregate((n.args, n.kwargs), lambda a: a.name if isinstance(a, fx.Node) else None)


class UntraceableError(ValueError):
    """torch.fx could not follow the code of a submodule, or of the model itself (``submodule`` is None)."""

    def __init__(self, submodule: str | None, why: str) -> None:
        super().__init__(why)
        self.submodule = submodule


def trace(
    model: nn.Module,
    bare: nn.Module,
    inputs: ExampleInputs,
    is_known: Callable[[nn.Module], bool],
) -> dict[bool, Program]:
    """Trace a model in train and in eval mode.

    A submodule that cannot be traced, or may do something else than its code, becomes one opaque operation, with a
    warning.

    Args:
        model: The model, with data.
        bare: Its skeleton.
        inputs: What it is called with.
        is_known: Tells modules that have a rule of their own and are not looked into.

    Raises:
        ValueError: if the model does not take these inputs, or its own forward cannot be traced, saying what to do
            instead.
    """
    inputs.arguments(bare.forward)  # before tracing, whose failures are blamed on the code
    hooked = unseen(model, inputs, is_known)
    opaque = dict(hooked)
    programs: dict[bool, Program] = {}
    while len(programs) < 2:
        try:
            programs = {training: Program.of(bare, inputs, training, is_known, opaque) for training in (True, False)}
        except UntraceableError as error:
            if error.submodule is None:
                raise ValueError(
                    f"{type(model).__name__}.forward cannot be traced by torch.fx ({error}). Its control flow depends "
                    "on the data or it calls code that needs real tensors: move that part into a submodule of its own "
                    "(which is then left uncut as a whole), or make the branch depend on attributes and shapes only"
                ) from error
            opaque[error.submodule] = str(error)
    if opaque:
        warn_user(
            "these submodules cannot be traced, so neurons that enter or leave them are not cut: "
            + "; ".join(f"{name} ({reason})" for name, reason in opaque.items() if not _is_inside(name, opaque))
            + (f". {_HOW_TO_HOOK}" if hooked else "")
        )
        copies = {name: structural_copy(model.get_submodule(name), lambda t: t.detach().clone()) for name in opaque}
        for program in programs.values():
            program.opaque = copies
    if inputs.batch_size == 1:
        _check_larger_batches(model, bare, inputs, is_known, programs)
    return programs


_HOW_TO_HOOK = (
    "A hook that only watches is no obstacle if it returns nothing: make it a def without a return value, as a lambda "
    "returns what it calls; one that returns something but leaves each channel in its place can say so by an "
    "attribute, hook.keeps_channels = True"
)


def _is_inside(name: str, others: Collection[str]) -> bool:
    """Tell whether a submodule is inside one of the others."""
    return any(name.startswith(f"{other}.") for other in others)


def unseen(model: nn.Module, inputs: ExampleInputs, is_known: Callable[[nn.Module], bool]) -> dict[str, str]:
    """Name the submodules that may do something else than tracing finds, and why."""
    return unseen_code(model, _Tracer(inputs, is_known, ()).is_leaf_module)


def _check_larger_batches(
    model: nn.Module,
    bare: nn.Module,
    inputs: ExampleInputs,
    is_known: Callable[[nn.Module], bool],
    programs: Mapping[bool, Program],
) -> None:
    """Refuse a single example where the model's code does something else for two."""
    for training, program in programs.items():
        if not program.asks:
            continue
        try:
            two = Program.of(bare, inputs.doubled(), training, is_known, program.opaque)
        except UntraceableError:  # it takes no more than one
            continue
        for a, b in zip(program.graph.nodes, two.graph.nodes, strict=False):
            if (a.op, a.target, wiring(a)) != (b.op, b.target, wiring(b)):
                raise ValueError(
                    f"{type(model).__name__}.forward does something else for a single example than for two, at "
                    f"{a.name} ({a.target}): give example_inputs of as many examples as it is trained on"
                )


class _Unpacked:
    """A value of tracing that knows into how many names the code takes it apart.

    torch.fx disassembles the whole calling function each time to find that out; here it is done once.
    """

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)
        number = _names_unpacked_into(caller.f_code, caller.f_lasti)
        if number is None:
            return self.tracer.iter(self)  # type: ignore[attr-defined, no-any-return]
        return (self[i] for i in range(number))  # type: ignore[index]

    def __hash__(self) -> int:  # for a set or a dict, in which it is not found as its value would be
        self.tracer.asked = True  # type: ignore[attr-defined]
        return super().__hash__()

    def __len__(self) -> int:
        return len(self.tracer.value_of(self.node))  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"{self}"

    def __format__(self, spec: str) -> str:
        value = self.tracer.value_of(self.node)  # type: ignore[attr-defined]
        if isinstance(value, torch.device):
            raise fx.proxy.TraceError("it asks for the kind of device")
        return format(value, spec)


class _Proxy(_Unpacked, fx.Proxy):
    """The result of an operation."""

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":  # which functions outside of torch's dispatcher, such as finfo, take as it is
            with contextlib.suppress(fx.proxy.TraceError):
                return self.tracer.value_of(self.node).dtype  # type: ignore[attr-defined]
        return _Attribute(self, name)


class _Attribute(_Unpacked, fx.proxy.Attribute):
    """An attribute of one, such as its shape."""


@functools.lru_cache(4096)
def _names_unpacked_into(code: types.CodeType, offset: int) -> int | None:
    """How many names the instruction assigns the parts of a value to; None where it does something else."""
    unpacking = (i for i in dis.get_instructions(code) if i.offset == offset and i.opname == "UNPACK_SEQUENCE")
    return next((int(i.argval) for i in unpacking), None)


_TRACE_ERRORS = (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError, LookupError)


_PLAIN = (int, float, bool, str, type(None))


class _Tracer(fx.Tracer):
    """Symbolic tracing that remembers the innermost submodule in which it failed.

    Args:
        inputs: What the model is called with. Arguments without tensors, and those that are not given, are what they
            are in that call; what the code asks of sizes is answered as in that call.
        is_known: Tells modules that have a rule of their own and are not looked into.
        opaque: Submodules that are not looked into either.
        buffers: Trace what is done with buffers; otherwise they are tensors whose shape the code may ask for.
    """

    def __init__(
        self,
        inputs: ExampleInputs,
        is_known: Callable[[nn.Module], bool],
        opaque: Collection[str],
        buffers: bool = False,
    ) -> None:
        super().__init__()
        self._inputs = inputs
        self._tracing = True
        self.proxy_buffer_attributes = buffers
        self._is_known = is_known
        self._opaque = opaque
        self.failed: str | None = None
        self.asked = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Do not look into known modules, torch's own, and those that failed before."""
        if module_qualified_name in self._opaque or self._is_known(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Make a placeholder for each argument that the model is called with and that holds tensors."""
        given = self._inputs.arguments(self.root.forward)
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in given}
        self._known: dict[fx.Node, Any] = {proxies[name].node: value for name, value in given.items()}
        args = [proxies.get(f"input_{i}", value) for i, value in enumerate(self._inputs.args)]
        kwargs = {name: proxies.get(name, value) for name, value in self._inputs.kwargs.items()}
        return functools.partial(root_fn, self.root, *args, **kwargs), []

    def value_of(self, node: fx.Node) -> Any:
        """Find out what an operation returns, tensors without data.

        Raises:
            fx.proxy.TraceError: if that depends on data or the device, or the operation cannot be run.
        """
        self.asked = True
        for n in self.graph.nodes:
            if n not in self._known:
                try:
                    self._known[n] = self._result(n)
                except (*_TRACE_ERRORS, NotImplementedError) as error:
                    raise fx.proxy.TraceError(f"{n.target} cannot be run without data: {error}") from error
            if n is node:
                break
        return self._known[node]

    def _result(self, n: fx.Node) -> Any:
        """Run one operation on what is known of its arguments."""
        known: Any = fx.node.map_arg((n.args, n.kwargs), lambda node: self._known[node])
        args, kwargs = known
        if _asks_for_device(n.target, args):
            raise fx.proxy.TraceError("it asks for the kind of device")
        with self._untraced(), torch.device("meta"):
            if n.op == "get_attr":
                return without_data(operator.attrgetter(str(n.target))(self.root))
            if n.op == "call_method":
                return getattr(args[0], str(n.target))(*args[1:], **kwargs)
            if n.op == "call_function":
                return n.target(*args, **kwargs)  # type: ignore[operator]
            module = self.root.get_submodule(str(n.target))
            if isinstance(module, nn.modules.batchnorm._NormBase):  # refuses a single example
                return torch.empty_like(args[0])
            return module(*args, **kwargs)

    @contextlib.contextmanager
    def _untraced(self) -> Iterator[None]:
        """Let modules be called, and asked for what they hold, as if nothing were traced."""
        self._tracing = False
        try:
            yield
        finally:
            self._tracing = True

    def iter(self, obj: Any) -> Iterator[Any]:
        """Go through the parts of a value whose number the inputs tell."""
        return (obj[i] for i in range(len(self.value_of(obj.node))))

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer a question about sizes; a cut that would change the answer is found when it is verified."""
        value = self.value_of(obj.node)
        if next(tensors(value), None) is not None:
            raise fx.proxy.TraceError("symbolically traced variables cannot be used as inputs to control flow")
        return bool(value)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Make the value of an operation."""
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **options: Any) -> Any:
        """Hand out the parts of a tensor as a tuple where their number is written in the call that makes them."""
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *others, **options)
        number = _number_of_parts(proxy.node)
        if number is None:
            return proxy
        parts = tuple(proxy[i] for i in range(number))
        self._parts += [part.node for part in parts]
        return parts

    def create_arg(self, a: Any) -> Any:
        """Find a tensor by identity at once, rather than by a walk through the whole model each time."""
        if isinstance(a, fx.Proxy):  # as most are
            return a.node
        if type(a) in _PLAIN:
            return a
        if type(a) is tuple:
            return tuple(map(self.create_arg, a))
        if type(a) is dict and not a:
            return {}
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name = self._tensor_names.get(id(a)) or self.tensor_attrs.get(a)
        if name is None and not isinstance(a, nn.Parameter):
            name = self.tensor_attrs[a] = self.get_fresh_qualname("_tensor_constant")
            setattr(self.root, name, a)
        return super().create_arg(a) if name is None else self.create_node("get_attr", name, (), {})

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Find what the model's code reads of a module likewise."""
        followed = self._tracing and isinstance(attr_val, Tensor if self.proxy_buffer_attributes else nn.Parameter)
        name = self._tensor_names.get(id(attr_val)) if followed else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def trace(self, root: Any, *args: Any, **kwargs: Any) -> fx.Graph:
        """Trace, and forget the parts that nothing reads."""
        self._parts: list[fx.Node] = []
        held = (*root.named_buffers(), *root.named_parameters())  # alive all the while: none gets another's identity
        self._tensor_names = {id(t): name for name, t in held}
        graph = super().trace(root, *args, **kwargs)
        for part in self._parts:
            if not part.users:
                graph.erase_node(part)
        return graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into a submodule; the innermost one that fails is remembered."""
        if not self._tracing:
            return forward(*args, **kwargs)
        if not args and self._is_known(m) and list(kwargs) == [*inspect.signature(m.forward).parameters][:1]:
            args, kwargs = tuple(kwargs.values()), {}  # rules expect what a layer reads in its place, not by name
        try:
            return super().call_module(m, forward, args, kwargs)
        except _TRACE_ERRORS:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


_DEVICE_QUESTIONS = ("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "get_device", "data_ptr", torch.get_device)


def _asks_for_device(target: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether a call asks what only a tensor with data can answer: where it lies."""
    if target is getattr:
        return isinstance(args[0], torch.device) or args[1] in _DEVICE_QUESTIONS
    named = (a.type for a in args if isinstance(a, torch.device))
    return target in _DEVICE_QUESTIONS or (target in (operator.eq, operator.ne) and any(d != "meta" for d in named))


def _number_of_parts(node: fx.Node) -> int | None:
    """Return how many parts a call of ``chunk`` or ``split`` asks for; None where only the data's shape tells."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    asked = next(iter([*node.args[1:], *node.kwargs.values()]), None)
    if node.op not in ("call_function", "call_method"):
        return None
    if name == "chunk" and isinstance(asked, int):
        return asked
    if name in ("split", "split_with_sizes") and isinstance(asked, (list, tuple)):
        return len(asked)
    return None
