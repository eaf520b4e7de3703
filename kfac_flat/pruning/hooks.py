"""What a module computes beyond the code of its class, which tracing does not see: forward hooks, replaced forwards."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

# Those of torch compute a module's weights and leave what it reads and returns alone; ours watch.
_HARMLESS = ("torch.nn.utils.", "kfac_flat.")


def unseen_code(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> dict[str, str]:
    """Name the submodules that may compute something else than tracing finds, and why.

    A hook is taken at its code: one that returns nothing changes nothing, unless it writes into the tensors it is
    given. The model itself may have any: its inputs and outputs are no neurons.

    Args:
        model: The model.
        is_leaf: Tells submodules, given with their name, whose forward is not looked into.
    """
    found = {name: list(_reasons(module, is_leaf(module, name))) for name, module in model.named_modules() if name}
    return {name: reasons[0] for name, reasons in found.items() if reasons}


def _reasons(module: nn.Module, leaf: bool) -> Iterator[str]:
    if leaf and "forward" in vars(module):
        yield "its forward has been replaced"
    if _may_return(module._forward_pre_hooks.values()):
        yield "a forward pre-hook may return other arguments"
    if _may_return(module._forward_hooks.values()):
        yield "a forward hook may return another output"


def _may_return(hooks: Iterable[Any]) -> bool:
    """Tell whether one of the hooks may return something."""
    functions = map(_function, hooks)
    return any(f is None or not (_is_harmless(f) or _returns_nothing(f.__code__)) for f in functions)


def _function(hook: Any) -> types.FunctionType | None:
    """Return the Python function that a hook runs; None if it is something else."""
    if isinstance(hook, functools.partial):
        return _function(hook.func)
    if isinstance(hook, types.MethodType):
        return _function(hook.__func__)
    if not isinstance(hook, types.FunctionType):
        called = type(hook).__call__
        return called if isinstance(called, types.FunctionType) else None
    decorated = vars(hook).get("__wrapped__")  # by torch.no_grad() and its like, which hand on what it returns
    return _function(decorated) if decorated is not None and _home(hook).startswith("torch.") else hook


def _is_harmless(function: types.FunctionType) -> bool:
    return f"{_home(function)}.".startswith(_HARMLESS)


def _home(function: types.FunctionType) -> str:
    """Name the module that a function's code was written in, whatever it wraps."""
    name: str = function.__globals__.get("__name__", "")
    return name


def _returns_nothing(code: types.CodeType) -> bool:
    """Tell whether a function's code returns None wherever it returns."""
    before: dis.Instruction | None = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        if instruction.opname == "RETURN_VALUE":
            none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
            if instruction.is_jump_target or not none:
                return False
        before = instruction
    return True
