"""Whether a trace does what the model's code does: both run without data, and torch's operations are compared.

torch.fx answers some of the questions that Python code asks by itself, wrongly where the answer for a tensor would be
another: ``isinstance(x, Tensor)``, ``hasattr(x, "sizes")``, ``x.grad_fn is None``, ``{12: 2.0}[x.shape[1]]``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_flat.nested import map_tensors, tensors
from kfac_flat.pruning import rules
from kfac_flat.pruning.execution import Run, on_zeros
from kfac_flat.pruning.tracing import ExampleInputs, Program

# What code raises that cannot run without data.
_NOT_WITHOUT_DATA = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def first_difference(bare: nn.Module, program: Program, inputs: ExampleInputs, results: Results) -> int | None:
    """Return the place in the trace at which the model's code does something else, or None if both do the same.

    Code that cannot run without data, as it may where random numbers decide, is not compared: that is None as well.

    Args:
        bare: A skeleton of the model, dense or cut, which is not changed.
        program: Its trace.
        inputs: What it is called with.
        results: What torch's operations are known to return, to which more is added.
    """
    by_code, by_trace = _Calls(bare, inputs, results), _Calls(bare, inputs, results)
    with torch.device("meta"), torch.set_grad_enabled(program.training), _doing_less(bare, program):
        try:
            with by_code:
                bare(*inputs.args, **inputs.kwargs)
            with by_trace:
                _Steps(bare, program, by_trace).run(*inputs.arguments(bare.forward).values())
        except _NOT_WITHOUT_DATA:  # what goes wrong in the trace is said where the neurons are followed
            return None
    pairs = zip_longest(*(by_code.in_place.written(calls.made) for calls in (by_code, by_trace)))
    different = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if different is None:
        return None
    return by_trace.places[different] if different < len(by_trace.places) else len(program.graph.nodes) - 1


_PARTS = (torch.ops.aten.unbind.int, torch.ops.aten.select.int)


class _Aliases(dict[Any, Any]):
    """What has been changed in place, by the name of the result: code may go on with either name, a trace with both."""

    def written(self, value: Any) -> Any:
        """Give the results of changes in place the names of what was changed."""
        return self._written(value) if self else value

    def _written(self, value: Any) -> Any:
        while isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int) and value in self:
            value = self[value]
        return type(value)(map(self._written, value)) if isinstance(value, (tuple, list)) else value


class Results:
    """What operations return, as far as it can be known without data: strides, shapes and types.

    torch works it out in Python for most, which takes most of the time; here it is done once for equal calls.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation on tensors without data, or return what an equal call did."""
        if not _makes_new_tensors(func):
            return func(*args, **kwargs)
        call = func, _comparable(args), _comparable(tuple(kwargs.items())) if kwargs else ()
        known = self._known.get(call)
        if known is not None:
            return map_tensors(_another, known)
        result = func(*args, **kwargs)
        if all(t.is_meta for t in tensors(result)):  # not what is made to run code that needs data
            self._known[call] = map_tensors(_another, result)
        return result


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    """Tell whether an operation returns tensors that are not those it is given, nor views of them."""
    returned = func._schema.returns
    return bool(returned) and all(r.alias_info is None and "Tensor" in str(r.type) for r in returned)


def _comparable(value: Any) -> Any:
    """Write an argument such that equal ones lead to equal results; ``1``, ``1.0`` and ``True`` do not."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride(), value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_comparable, value))
    return type(value), value


def _another(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down, one after the other, what is done with a model's inputs, its parameters, and what becomes of them.

    What is done with anything else is a constant of the trace.
    """

    def __init__(self, model: nn.Module, inputs: ExampleInputs, results: Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results
        self.made: list[Any] = []
        self.in_place = _Aliases()
        self.places: list[int] = []
        self.place = 0
        self._names: dict[int, Any] = {id(p): name for name, p in model.named_parameters()}
        self._names |= {id(t): i for i, t in enumerate(tensors((inputs.args, inputs.kwargs)))}
        self._follows = False
        self._alive: list[Tensor] = []  # so that no other tensor gets the identity of one that is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._follows = False
        called_with = self._name(args), self._name(tuple(kwargs.items())) if kwargs else ()
        if not self._follows:
            return func(*args, **kwargs)
        result = self._results.of(func, args, kwargs)
        if func in _PARTS:
            self._name_parts(result, *args)
        else:
            if result is args[0] and id(result) in self._names:
                self.in_place[(len(self.made), 0)] = self._names[id(result)]
            for i, t in enumerate((result,) if isinstance(result, Tensor) else tensors(result)):
                self._names[id(t)] = (len(self.made), i)
                self._alive.append(t)
            self.made.append((_out_of_place(func), called_with))
            self.places.append(self.place)
        return result

    def _name_parts(self, parts: Any, whole: Tensor, dim: int = 0, index: int = 0) -> None:
        """Parts along an axis are the same whether they are taken one by one or all at once, as loops take them."""
        for i, part in enumerate(tensors(parts)):
            self._names[id(part)] = (self._names[id(whole)], dim % whole.dim(), (index + i) % whole.shape[dim])
            self._alive.append(part)

    def _name(self, value: Any) -> Any:
        """Write a value such that it can be compared, and note whether it holds a tensor that is followed."""
        if type(value) is int:
            return value
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            self._follows |= name is not None
            return "constant" if name is None else name
        if isinstance(value, (tuple, list)):
            return tuple(self._name(part) for part in value)
        return "nan" if value != value else value


@functools.cache
def _out_of_place(func: Any) -> str:
    """Name an operation: ``x += y`` is traced as ``x = x + y``."""
    name = str(func._schema.name).replace("::__i", "::__").rstrip("_")
    return f"{name}.{func._overloadname}"


class _Steps(Run):
    """Runs a trace, and says where it is."""

    def __init__(self, model: nn.Module, program: Program, calls: _Calls) -> None:
        super().__init__(model, program)
        self._calls = calls
        self._places = {n: i for i, n in enumerate(program.graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        self._calls.place = self._places[n]
        return super().run_node(n)


@contextlib.contextmanager
def _doing_less(bare: nn.Module, program: Program) -> Iterator[None]:
    """Let norms, which would refuse a single example, and what is not looked into do less."""
    with _taken_back(bare):
        bare.train(program.training)
        for name, module in bare.named_modules():
            own_code = not rules.is_leaf(module) and not type(module).__module__.startswith("torch.")
            if name in program.opaque:
                module.forward = functools.partial(_opaque, program.opaque[name])
            elif isinstance(module, _NormBase) and not own_code:
                module.forward = _normed
        yield


# What every module holds; of that, code changes parameters, buffers and modules.
_OF_TORCH = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def _taken_back(bare: nn.Module) -> Iterator[None]:
    """Take out again what the model's code puts into its modules meanwhile, or into lists, dicts and others they hold.

    Those are copies meanwhile; modules and tensors stay the same objects.
    """
    modules = [m for m in bare.modules() if not isinstance(m, torch.jit.ScriptModule)]  # whose code is not Python
    before = [(held, dict(held)) for m in modules for held in (vars(m), m._parameters, m._buffers, m._modules)]
    memo: dict[int, Any] = {id(m): m for m in bare.modules()}
    memo |= {id(o): o for _, own in before for o in own.values() if isinstance(o, (Tensor, fx.Graph))}
    try:
        for m in modules:
            vars(m).update({k: copy.deepcopy(held, memo) for k, held in vars(m).items() if k not in _OF_TORCH})
        yield
    finally:
        for held, own in before:
            held.clear()
            held.update(own)


def _opaque(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return on_zeros(module, args, kwargs)


def _normed(input: Tensor) -> Tensor:
    return input.clone()
