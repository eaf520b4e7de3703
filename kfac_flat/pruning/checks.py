"""What a pruner is given: told apart and refused with advice before any work is done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from kfac_flat.pruning.surgery import difference
from kfac_flat.structure import unwrap
from kfac_flat.wrapper import OptimizerWrapper, check_innermost, wrapper_of


def ignored(model: nn.Module, ignore: Iterable[str | type[nn.Module]]) -> dict[str, str]:
    """Names of all modules that are, or lie inside, what is to be ignored."""
    if isinstance(ignore, (str, type)):
        raise ValueError(f"ignore={ignore!r} must be a collection of names and classes, such as ({ignore!r},)")
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for choice in ignore:
        if not isinstance(choice, (str, type)):
            meant = "".join(f"; say {name!r}" for name, module in modules.items() if module is choice)
            raise ValueError(f"ignore= takes names and classes, not a {type(choice).__name__} itself{meant}")
        roots = [
            name
            for name, module in modules.items()
            if (fnmatch.fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice))
        ]
        if not roots:
            raise ValueError(f"ignore={choice!r} matches no module of the model")
        inside = (name for name in modules if any(name == root or name.startswith(f"{root}.") for root in roots))
        found.update(dict.fromkeys(inside, "ignored on request"))
    return found


def checked_copies(model: nn.Module, copies: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the models inside their wrappers, found to be of the model's structure."""
    if isinstance(copies, nn.Module):
        raise TypeError(f"copies must be a collection of models, such as [{type(copies).__name__}(...)]")
    found = []
    for i, wrapped in enumerate(copies):
        if not isinstance(wrapped, nn.Module):
            raise TypeError(f"copies[{i}] must be a torch.nn.Module, not {type(wrapped).__name__}")
        found.append(unwrap(wrapped.module if isinstance(wrapped, AveragedModel) else wrapped))
        different = difference(model, found[i])
        if different:
            raise ValueError(f"copies[{i}] is no copy of the model: {different}")
    return found


def trained_elsewhere(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """Names of modules with trainable parameters that this optimizer does not hold, whose state would stay behind."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        name: "has trainable parameters that are not the optimizer's"
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad and id(p) not in held for p in module._parameters.values())
    }


def check_kinds(model: Any, optimizer: Any) -> None:
    """Refuse what is no model or no optimizer, and models inside wrappers that a cut cannot reach through."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "prune the model inside the wrapper, model.module, and let the wrapper follow: "
            "`with kfac_flat.rewrap(model): pruner.step()`"
        )
    if isinstance(inner, nn.DataParallel):
        raise TypeError("prune the model inside the wrapper, model.module")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer instance, not {type(optimizer).__name__}")
    check_innermost("NeuronPruner", optimizer)


def check_shared(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that does not train the model, or whose penalty would be missed."""
    wrapper = wrapper_of(optimizer)
    if wrapper is not None:
        raise ValueError(f"give NeuronPruner the {type(wrapper).__name__} itself, not the optimizer that it wraps")
    of_model = {id(p) for p in model.parameters()}
    if not any(id(p) in of_model for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: build it from the parameters of this very model"
        )
    if isinstance(optimizer, OptimizerWrapper) and unwrap(optimizer.model) is not model:
        raise ValueError(
            f"the {type(optimizer).__name__} was given another module than this pruner, so it could not follow a cut: "
            "give both the same one, such as the network inside of what trains it"
        )
