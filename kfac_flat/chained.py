"""Several optimizers that share a model's parameters among them, as one optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from kfac_flat.changes import Change, make_all, setting
from kfac_flat.wrapper import OptimizerWrapper, check_innermost, wrapper_of


class ChainedOptimizer(Optimizer):
    """Step several optimizers as one, each with parameters of its own.

    For models of which parts are trained by different rules, such as matrices by Muon and all else by AdamW:
    :class:`FlatKFAC` then adds the penalty's gradient to the parameters of all, and :class:`NeuronPruner` cuts the
    state of all. Step this one, not the optimizers in it; the trajectory is that of stepping them one after the other,
    bit for bit.

    ``param_groups`` and ``state`` are those of all optimizers, in their order, and so are those of a checkpoint, which
    has the form of a single optimizer's. A scheduler may be given this one or one of the optimizers, a GradScaler has
    to be given this one.

    Args:
        optimizers: One or more, of which no two hold the same parameter. None of them a wrapper, such as
            :class:`FlatKFAC`, which goes around this one, and no LBFGS.

    Attributes:
        optimizers: The same, as a tuple.

    Raises:
        TypeError: if one of ``optimizers`` is of a kind that cannot be stepped together with others.
        ValueError: if there is none, or a parameter is held by two.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> matrices = torch.optim.SGD([p for p in model.parameters() if p.dim() == 2], lr=0.1, momentum=0.9)
        >>> others = torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01)
        >>> optimizer = ChainedOptimizer([matrices, others])
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> len(matrices.state), len(others.state), len(optimizer.state)
        (2, 2, 4)
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if isinstance(optimizers, Optimizer):
            raise TypeError("ChainedOptimizer takes a list: ChainedOptimizer([first, second])")
        self.optimizers = tuple(optimizers)
        if not self.optimizers:
            raise ValueError("ChainedOptimizer was given no optimizer")
        for optimizer in self.optimizers:
            _check_member(optimizer)
        held = [p for group in self.param_groups for p in group["params"]]
        if len({id(p) for p in held}) < len(held):
            raise ValueError("two of the optimizers hold the same parameter, which each step would change twice")
        self.__setstate__({"optimizers": self.optimizers})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for optimizer in self.optimizers:
            optimizer._wrapper = weakref.ref(self)  # type: ignore[attr-defined]  # the one to be given to others

    # ---------------------------------------------------------------- what all hold together

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in a list of their own."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]
        """The state of all optimizers, by parameter; what is set there is set in the optimizer of the parameter."""
        return _States(self.optimizers)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of all optimizers, as far as they agree; schedulers ask by them what an optimizer can do."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse, since it is not known whose the group is to be."""
        raise TypeError("a ChainedOptimizer has no groups of its own: add the group to one of its optimizers")

    # ---------------------------------------------------------------- stepping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as each optimizer does its own."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each optimizer, in order.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, before the first optimizer steps.

        Returns:
            What the closure returned, None without.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all optimizers, in the form of one optimizer's.

        Raises:
            TypeError: if one of them keeps what this form has no place for.
        """
        for optimizer in self.optimizers:
            hooks = optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks
            if hooks or not all(isinstance(key, Tensor) for key in optimizer.state):
                raise TypeError(
                    f"{type(optimizer).__name__} keeps more than its parameters' state, or has hooks on its "
                    "state_dict(): a checkpoint of the ChainedOptimizer would lack that"
                )
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore all optimizers, or none.

        Raises:
            ValueError: if it belongs to optimizers with other groups; nothing has changed then, nor when one of the
                optimizers refuses its part.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, dict(state_dict)) or state_dict
        saved, present = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in present]:
            raise ValueError(
                "the checkpoint's parameter groups are not those of the chained optimizers: chain the same optimizers "
                "over the same parameters, in the same order"
            )
        groups, changes = iter(saved), []
        for optimizer in self.optimizers:
            own = list(islice(groups, len(optimizer.param_groups)))
            numbers = {number for group in own for number in group["params"]}
            state = {number: kept for number, kept in state_dict["state"].items() if number in numbers}
            changes.append(_loading(optimizer, {"state": state, "param_groups": own}))
        make_all(changes)
        for told in self._optimizer_load_state_dict_post_hooks.values():
            told(self)


def _loading(optimizer: Optimizer, state_dict: dict[str, Any]) -> Change:
    """Restore an optimizer; torch puts new groups and a new state in the place of the old ones."""
    before = setting(optimizer, {"param_groups": optimizer.param_groups, "state": optimizer.state})
    return Change(lambda: optimizer.load_state_dict(state_dict), before.take_back)


class _States(MutableMapping[Any, Any]):
    """The state of several optimizers, as that of one: a parameter that is asked for and has none gets one."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: Any) -> Any:
        return self._holder(parameter)[parameter]

    def get(self, parameter: Any, default: Any = None) -> Any:
        if parameter in self:  # asking for one that is not there would make it
            return self[parameter]
        return default

    def pop(self, parameter: Any, *default: Any) -> Any:
        if default and parameter not in self:
            return default[0]
        return self._holder(parameter).pop(parameter)

    def setdefault(self, parameter: Any, default: Any = None) -> Any:
        return self._holder(parameter).setdefault(parameter, default)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __setitem__(self, parameter: Any, state: Any) -> None:
        self._holder(parameter)[parameter] = state

    def __delitem__(self, parameter: Any) -> None:
        del self._holder(parameter)[parameter]

    def __contains__(self, parameter: Any) -> bool:
        return any(parameter in optimizer.state for optimizer in self._optimizers)

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def _holder(self, parameter: Any) -> Any:
        """Return the state of the optimizer that has this parameter."""
        for optimizer in self._optimizers:
            groups = optimizer.param_groups
            if parameter in optimizer.state or any(p is parameter for group in groups for p in group["params"]):
                return optimizer.state
        raise KeyError(parameter)


def _check_member(optimizer: Any) -> None:
    """Refuse what cannot be stepped together with other optimizers."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"ChainedOptimizer chains torch.optim.Optimizer instances, not {name}")
    check_innermost("ChainedOptimizer", optimizer)
    if isinstance(optimizer, (OptimizerWrapper, ChainedOptimizer)):
        raise TypeError(f"a {name} cannot be chained: chain the optimizers inside it, and wrap the ChainedOptimizer")
    if isinstance(wrapper_of(optimizer), OptimizerWrapper):
        raise TypeError(f"the {name} is wrapped already, and what wraps it would be missed: wrap the ChainedOptimizer")
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS evaluates the loss several times in a step, so it cannot be stepped with others")
    if type(optimizer).state_dict is not Optimizer.state_dict:
        raise TypeError(f"{name} has checkpoints of its own form, which cannot be joined with those of others")
