"""Rules for operations of one's own, or of packages that this one does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from kfac_flat.pruning import layers, rules
from kfac_flat.pruning.rules import Rule

# What a traced model calls: a function, a tensor method by its name, or a class of modules.
Target: TypeAlias = "Callable[..., Any] | str | type[nn.Module]"


def register_rule(target: Target, like: Target | None = None, *, rule: Rule | None = None) -> None:
    """Tell the pruner what an operation does to neurons, so that it no longer freezes those that pass through.

    Register before pruners are made. It holds for the whole process, so put it next to the operation itself. Nothing
    of it is checked beyond the neurons' places: an operation that mixes channels and is registered as one that does not
    would be followed wrongly. Compare with a masked copy once, as the page on contributing shows.

    torch.fx shows a function of your own as one operation if it is marked by ``torch.fx.wrap``, and one made by
    ``torch.library`` in any case; for the latter register ``torch.ops.<library>.<name>``. A module of a registered
    class is one operation, too, and its code is not looked into, if it holds no tensors but scalars. Others might
    belong to single neurons and would have to be cut along, so a module with such is followed as if it had no rule.

    Args:
        target: A function, the name of a tensor method, or a class of modules; subclasses need an entry of their own.
        like: An operation that has a rule and does the same to neurons, with the same arguments in the same places
            (for modules, in the same attributes): ``torch.relu`` for what works entry by entry on tensors that may be
            broadcast, ``nn.MaxPool2d`` for what works on the pixels of each channel, ``torch.sum``, ``torch.reshape``.
        rule: Or a rule of your own: from a :class:`~kfac_flat.pruning.rules.Operation` to the ids of its result.

    Raises:
        TypeError: if ``target`` is none of these, or ``rule`` cannot be called.
        ValueError: if there are not exactly one of ``like`` and ``rule``, ``like`` has no rule, or ``target`` has
            another one already.

    Example:
        >>> import torch
        >>> from kfac_flat import NeuronPruner, register_rule
        >>> class Halved(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2 if x.sum() > 0 else x  # depends on the data, so that it cannot be traced
        >>> register_rule(Halved, like=nn.ReLU)
        >>> model = nn.Sequential(nn.Linear(4, 8), Halved(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5).frozen
        {'2': "forms the model's output"}
    """
    if (like is None) == (rule is None):
        raise ValueError("register_rule takes either like=, an operation that has a rule, or rule=, one of your own")
    known = _rule_of(like) if like is not None else rule
    if known is None:
        raise ValueError(f"like={_name(like)} has no rule itself: name an operation of torch that the pruner follows")
    if not callable(known):
        raise TypeError(f"rule must be a function from an Operation to ids, not {type(known).__name__}")
    if isinstance(target, nn.Module) or not (isinstance(target, str) or callable(target)):
        raise TypeError(
            f"register_rule takes a function, the name of a tensor method or a class of modules, not {_name(target)}"
        )
    if isinstance(target, type) and issubclass(target, (*layers.PRODUCERS, *layers.PASSING)):
        raise ValueError(f"{_name(target)} has channels of its own, which a rule cannot cut")
    if _rule_of(target) not in (None, known):
        raise ValueError(f"{_name(target)} has another rule already, which pruners may have gone by")
    _table_of(target)[target] = known
    if like in rules.SIZED:
        rules.SIZED.add(target)


def _rule_of(target: Target) -> Rule | None:
    """Return the rule of a target, if there is one."""
    if isinstance(target, type) and issubclass(target, nn.Module):
        return rules.MODULE_RULES.get(target) or rules.REGISTERED_MODULES.get(target)
    return rules.find(target)


def _table_of(target: Target) -> dict[Any, Rule]:
    """Return where rules for targets of this kind are looked up."""
    if isinstance(target, str):
        return rules.METHOD_RULES
    if isinstance(target, type) and issubclass(target, nn.Module):
        return rules.REGISTERED_MODULES
    return rules.FUNCTION_RULES


def _name(target: Any) -> str:
    return getattr(target, "__name__", None) or repr(target)
