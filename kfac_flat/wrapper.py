"""What wrapping an optimizer means: groups, state and defaults stay its own, and it steps on changed gradients."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kfac_flat.averaging import processes
from kfac_flat.structure import unwrap


class OptimizerWrapper(Optimizer, ABC):
    """An optimizer instance and the model it trains; whatever is asked of one is answered by the other.

    Args:
        optimizer: An optimizer instance over (some of) the model's parameters.
        model: The model being trained; wrappers may be on.

    Raises:
        TypeError: if ``optimizer`` is no optimizer instance or ``model`` no module.
        ValueError: if the optimizer's parameters are not the model's.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        _check_types(type(self).__name__, optimizer, model)
        self.base, self.model, self._inner = optimizer, model, unwrap(model)
        optimizer._wrapper = weakref.ref(self)  # type: ignore[attr-defined]  # for those who should be given this one
        super().__setstate__({})  # torch's own way to give an optimizer its hook tables without touching its groups
        self._parameters()  # raises where the optimizer's parameters are not the model's

    # ---------------------------------------------------------------- one truth: the wrapped optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.base.zero_grad(set_to_none)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Register a hook that sees the gradients the wrapped optimizer is about to apply."""
        return self.base.register_step_pre_hook(hook)

    # ---------------------------------------------------------------- stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change the gradients in ``p.grad`` and let the wrapped optimizer step on them.

        Args:
            closure: As the wrapped optimizer takes it: re-evaluates the model and returns the loss.

        Returns:
            What the wrapped optimizer returns.

        Raises:
            RuntimeError: if no forward pass of the model has been seen; model and optimizer are as before.
        """
        if closure is None:
            self._change_gradients()
            return self.base.step()

        def closure_with_change() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._change_gradients()
            return loss

        return self.base.step(closure_with_change)

    @abstractmethod
    def _change_gradients(self) -> None:
        """Turn the loss's gradients in ``p.grad`` into those of the objective."""

    def _all_parameters(self) -> list[nn.Parameter]:
        """Every parameter of the wrapped optimizer, in its order."""
        return [p for group in self.param_groups for p in group["params"]]

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters that are both the optimizer's and the model's, in the optimizer's order."""
        of_model = {id(p) for p in self._inner.parameters()}
        shared = [p for p in self._all_parameters() if id(p) in of_model]
        if not shared:
            raise ValueError(
                "none of the optimizer's parameters belongs to the model: build the optimizer from the parameters of "
                f"the very model given to {type(self).__name__} (a copied or re-created model has new ones)"
            )
        return shared

    def _parameters_with_gradient(self) -> list[nn.Parameter]:
        """Those that the next step changes, sparse gradients left alone."""
        return [p for p in self._parameters() if p.grad is not None and p.grad.layout == torch.strided]


def _check_types(name: str, optimizer: Any, model: Any) -> None:
    if isinstance(optimizer, type):
        raise TypeError(
            f"{name} wraps an optimizer instance, not the class: "
            f"{name}({optimizer.__name__}(model.parameters(), ...), model)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    check_innermost(name, optimizer)
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__} already, and what one wrapper does to the gradients the "
            "next would do to again or undo: wrap the optimizer inside it"
        )
    chain = wrapper_of(optimizer)
    if chain is not None and not isinstance(chain, OptimizerWrapper):
        raise TypeError(f"the optimizer is one of several in a {type(chain).__name__}: give {name} all of these")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def wrapper_of(optimizer: Optimizer) -> Optimizer | None:
    """Return the outermost optimizer that steps this one, if there is any."""
    wrapper: Optimizer | None = getattr(optimizer, "_wrapper", lambda: None)()
    return wrapper and (wrapper_of(wrapper) or wrapper)


def check_innermost(name: str, optimizer: Optimizer) -> None:
    """Refuse what another library puts around an optimizer, such as Accelerate, and which may leave out steps of it.

    Raises:
        TypeError: if this is such a wrapper.
    """
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise TypeError(
            f"give {name} the optimizer inside of the {type(optimizer).__name__}, and build it before the "
            "optimizer is wrapped"
        )


def refuse_several_processes(wrapper: OptimizerWrapper) -> None:
    """Refuse a DistributedDataParallel of several processes, for wrappers that do not reduce what they add.

    Raises:
        TypeError: if there are several.
    """
    group = processes(wrapper.model)
    if group is not None and group.size() > 1:
        raise TypeError(
            f"{type(wrapper).__name__} does not reduce its gradient over processes, so replicas would drift apart: "
            "train in one process"
        )
