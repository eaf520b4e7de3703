"""What a module computes beyond the code of its class, which tracing does not see: forward hooks, replaced forwards."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks as _GLOBAL_HOOKS
from torch.nn.modules.module import _global_forward_pre_hooks as _GLOBAL_PRE_HOOKS

# Those of torch compute a module's weights and leave what it reads and returns alone; ours watch.
_HARMLESS = ("torch.nn.utils.", "kfac_flat.")

_RETURNS_AT_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def unseen_code(model: nn.Module, is_leaf: Callable[[nn.Module, str], bool]) -> dict[str, str]:
    """Name the submodules that may compute something else than tracing finds, and why.

    A hook is taken at its code: one that returns nothing changes nothing, unless it writes into what it is given. One
    with an attribute ``keeps_channels`` that is true is taken at its word: whatever it returns, and however many
    channels there are, each stays in its place and depends on no other. The model itself may have any: its inputs and
    outputs are no neurons. What is looked at at a leaf is all that it holds.

    Args:
        model: The model.
        is_leaf: Tells submodules, given with their name, whose forward is not looked into.
    """
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        leaf = is_leaf(module, name)
        parts = module.modules() if leaf else (module,)
        found[name] = next((reason for part in parts for reason in _reasons(part, leaf)), None)
    return {name: reason for name, reason in found.items() if name and reason}


def _reasons(module: nn.Module, leaf: bool) -> Iterator[str]:
    if leaf and "forward" in vars(module):
        yield "its forward has been replaced"
    if leaf and _is_patched(type(module)):
        yield "the forward of its class has been replaced"
    if _may_return((*_GLOBAL_PRE_HOOKS.values(), *module._forward_pre_hooks.values())):
        yield "a forward pre-hook may return other arguments"
    if _may_return((*_GLOBAL_HOOKS.values(), *module._forward_hooks.values())):
        yield "a forward hook may return another output"


def _is_patched(kind: type[nn.Module]) -> bool:
    """Tell whether a class of torch's runs a forward that was written elsewhere."""
    owner = next(k for k in kind.__mro__ if "forward" in vars(k))
    forward = vars(owner)["forward"]
    of_torch = isinstance(forward, types.FunctionType) and f"{_home(forward)}.".startswith("torch.")
    return owner.__module__.startswith("torch.nn.") and not of_torch


def _may_return(hooks: Iterable[Any]) -> bool:
    """Tell whether one of the hooks may return something, other than those that say they leave channels in place."""
    functions = (_function(hook) for hook in hooks if not getattr(hook, "keeps_channels", False))
    return any(f is None or not (_is_harmless(f) or _returns_nothing(f.__code__)) for f in functions)


def _function(hook: Any) -> types.FunctionType | None:
    """Return the Python function that a hook runs; None if it is something else."""
    if isinstance(hook, functools.partial):
        return _function(hook.func)
    if isinstance(hook, types.MethodType):
        return _function(hook.__func__)
    if not isinstance(hook, types.FunctionType):
        called = type(hook).__call__
        return _function(called) if isinstance(called, types.FunctionType) else None
    decorated = vars(hook).get("__wrapped__")  # by torch.no_grad() and its like, which hand on what it returns
    return _function(decorated) if decorated is not None and _home(hook).startswith("torch.") else hook


def _is_harmless(function: types.FunctionType) -> bool:
    return f"{_home(function)}.".startswith(_HARMLESS)


def _home(function: types.FunctionType) -> str:
    """Name the module that a function's code was written in, whatever it wraps."""
    name: str = function.__globals__.get("__name__", "")
    return name


def _returns_nothing(code: types.CodeType) -> bool:
    """Tell whether a function's code returns None wherever it returns; a generator's call returns more than that."""
    if code.co_flags & _RETURNS_AT_ONCE:
        return False
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
