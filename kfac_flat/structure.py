"""Copies of a model's structure: the same modules again, holding tensors of one's choice."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class Kept:
    """What remains of a module's channels: positions into the module as it was, ascending, ``int64`` on the CPU.

    Attributes:
        inputs: Kept input channels or features.
        outputs: Kept output channels or features.
    """

    inputs: Tensor
    outputs: Tensor


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside DistributedDataParallel, DataParallel or ``torch.compile`` wrappers."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return unwrap(model.module)
    compiled_from = getattr(model, "_orig_mod", None)
    return unwrap(compiled_from) if isinstance(compiled_from, nn.Module) else model


def structural_copy(model: Module, tensor: Callable[[Tensor], Tensor]) -> Module:
    """Copy every module of ``model``, with ``tensor(t)`` in place of each parameter, buffer or other tensor ``t``.

    User hooks are left behind, but for those by which ``torch.nn.utils`` computes a weight (weight_norm, spectral_norm,
    masks of ``torch.nn.utils.prune``), without which the copy would compute something else.

    Raises:
        TypeError: if an attribute of a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for t in held:
            if isinstance(t, Tensor) and id(t) not in memo:
                memo[id(t)] = tensor(t)
        empty = [v for v in vars(module).values() if type(v) in (dict, OrderedDict) and not v]
        memo.update((id(v), type(v)()) for v in empty)  # most of what a module holds, which deepcopy takes long for
    try:
        for hooks in _hooks_of(model):  # the copy finds in their place those that it needs
            kept = {key: hook for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")}
            memo[id(hooks)] = type(hooks)(copy.deepcopy(kept, memo))
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"the structure of {type(model).__name__} cannot be copied ({error}); "
            "give the attribute that holds it a __deepcopy__, or keep it outside the model"
        ) from error
    for module in copied.modules():
        _run_own_code(module, memo)
    return copied


def _run_own_code(module: nn.Module, memo: Mapping[int, Any]) -> None:
    """Part a copied module from functions that run the original: what Module.compile() made, and closures."""
    own = vars(module)
    own.pop("_compiled_call_impl", None)
    for name, value in own.items():
        if isinstance(value, types.FunctionType):
            own[name] = _rebound(value, memo, {})


def _rebound(
    function: types.FunctionType, memo: Mapping[int, Any], seen: dict[int, types.FunctionType]
) -> types.FunctionType:
    """Return the function as it is with the copies, by ``memo``, of what its closure and its defaults hold.

    Functions and methods in there are taken at what they hold, each once: one that holds itself goes on with itself.
    """
    seen[id(function)] = function
    try:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # a cell that is still empty
        return function
    defaults = function.__defaults__ or ()
    copied = [_copied(item, memo, seen) for item in (*held, *defaults)]
    if all(new is item for new, item in zip(copied, (*held, *defaults), strict=True)):
        return function
    cells = tuple(types.CellType(new) for new in copied[: len(held)])
    new_defaults = tuple(copied[len(held) :]) or None
    rebound = types.FunctionType(function.__code__, function.__globals__, function.__name__, new_defaults, cells)
    rebound.__kwdefaults__ = function.__kwdefaults__
    seen[id(function)] = rebound
    return rebound


def _copied(item: Any, memo: Mapping[int, Any], seen: dict[int, types.FunctionType]) -> Any:
    """Return the copy of an object that has one, of a method bound to it, or of a function that holds it."""
    if isinstance(item, types.MethodType) and id(item.__self__) in memo:
        return types.MethodType(item.__func__, memo[id(item.__self__)])
    if isinstance(item, types.FunctionType):
        return seen.get(id(item)) or _rebound(item, memo, seen)
    return memo.get(id(item), item)


def _hooks_of(model: nn.Module) -> list[dict[int, Any]]:
    """Return the dicts of hooks of all modules that have any."""
    found = (getattr(module, name, None) for module in model.modules() for name in _HOOK_DICTS)
    return [hooks for hooks in found if hooks]
