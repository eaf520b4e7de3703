"""SAM: each step goes by the gradient at the worst weights nearby [Foret et al., arXiv 2010.01412]."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from kfac_flat.curvature.twin import Twin
from kfac_flat.recorder import CallRecorder, RecordedCall
from kfac_flat.wrapper import OptimizerWrapper, refuse_several_processes

# Cosine between a gradient and the same one computed again, where rounding alone lies between them.
_SAME = 0.99


class SAM(OptimizerWrapper):
    """Wrap a torch optimizer so that it minimises the largest loss within a distance of rho.

    The training loop stays as it is: ``criterion(model(x), y).backward(); optimizer.step()``. ``step()`` moves the
    weights by ``rho * g / ||g||``, g being the gradient in ``p.grad`` over all parameters [eq. 2], repeats what the
    gradient was computed by, puts the weights back to the bit, and lets the wrapped optimizer step on the gradient
    found there [eq. 3]. A step costs about two.

    What is repeated are the calls of model and criterion whose results were backpropagated since the gradients were
    cleared, however many were accumulated, on the same examples, dropout masks and precision, each with the weight that
    ``backward()`` gave it. They run on a copy that shares the parameters, so that BatchNorm's running statistics are
    touched once per step, by the loop's own pass. At the first step the gradient itself is repeated before anything
    else, to see whether it comes out the same.

    Where the gradient there is not finite, the step goes by the one in ``p.grad``; see :attr:`skipped`. With ``rho=0``
    the trajectory is the wrapped optimizer's, bit for bit. Clipping before ``step()`` does not bound what the wrapped
    optimizer gets; a hook registered by :meth:`register_step_pre_hook` can. :class:`kfac_flat.NeuronPruner` scores by
    the gradients that the step goes by.

    Args:
        optimizer: An optimizer instance over (some of) the model's parameters. ``param_groups``, ``state`` and
            ``defaults`` stay its own. Step the wrapper, not this.
        model: The model being trained, in one process.
        criterion: The loss module, called in the training loop as ``criterion(model(x), y)``.
        rho: Length of the move, or a function of the step count.
        grad_scaler: The GradScaler of the training loop, if it has one.

    Raises:
        TypeError: if ``optimizer`` is no optimizer instance, or ``model`` or ``criterion`` no module.
        ValueError: if ``rho`` is out of range or the optimizer's parameters are not the model's.

    Example:
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, criterion, rho=0.05)
        >>> criterion(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: nn.Module,
        *,
        rho: float | Callable[[int], float] = 0.05,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(criterion, nn.Module):
            raise TypeError(f"criterion must be the training loop's loss module, not {type(criterion).__name__}")
        if not callable(rho):
            _check_rho(rho)
        super().__init__(optimizer, model)
        refuse_several_processes(self)
        self._rho, self._criterion, self._scaler = rho, criterion, grad_scaler
        self._steps, self._skipped = 0, torch.tensor(0)
        self._passes: list[_Pass] = []
        self._backward = -1
        self._checked = False
        self._twin: Twin | None = None
        alive = weakref.ref(self)
        self._calls = CallRecorder.attach(self.model, lambda: _moves_next(alive()), owner=self)
        self._criterion_calls = CallRecorder.attach(criterion, lambda: _moves_next(alive()), owner=self)
        weakref.finalize(self, criterion.register_forward_hook(_LossHook(alive)).remove)

    @property
    def skipped(self) -> int:
        """Number of steps that went by the gradient where they started, that at the worst weights not being finite."""
        return int(self._skipped)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self._passes = []
        for calls in (self._calls, self._criterion_calls):
            calls.forget_finished()
        super().zero_grad(set_to_none)

    # ---------------------------------------------------------------- stepping

    @torch.no_grad()
    def _change_gradients(self) -> None:
        """Replace the gradient by that at the worst weights nearby."""
        rho = self._distance()
        parameters = self._parameters_with_gradient()
        if rho and parameters:
            self._check_repeatable(parameters)
            gradients = [p.grad for p in parameters if p.grad is not None]
            with moved(parameters, ascent(gradients, rho)):
                found = self._repeat(parameters)
            finite = get_total_norm([g for g in found if g is not None]).isfinite()
            for gradient, there in zip(gradients, found, strict=True):
                if there is not None:
                    gradient.copy_(torch.where(finite, there.to(gradient.dtype), gradient))
            self._skipped = self._skipped.to(finite.device) + ~finite
        self._forget()
        self._steps += 1

    def _distance(self) -> float:
        """Length of the move at the next step."""
        return _check_rho(self._rho(self._steps)) if callable(self._rho) else self._rho

    def _repeat(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Return the gradient of all that was backpropagated, at the weights as they are now."""
        self._twin = Twin.current(self._twin, self._inner, [])
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        total: list[Tensor | None] = [None] * len(parameters)
        for own in self._passes:
            _, loss = self._twin.run(own.call.args, own.call.kwargs, own.loss, own.call.conditions)
            found = torch.autograd.grad(loss, parameters, own.gradient, allow_unused=True)
            total = [
                t if g is None else g / scale if t is None else t + g / scale for t, g in zip(total, found, strict=True)
            ]
        return total

    def _check_repeatable(self, parameters: Sequence[nn.Parameter]) -> None:
        """See, once, that repeating the recorded calls gives the gradient that the loop has computed.

        Raises:
            RuntimeError: if it does not.
        """
        if not self._passes:
            raise RuntimeError(
                "SAM.step() has seen nothing to repeat: call the model and the criterion that it was given as "
                "criterion(model(x), y), and backward() on the result, before step()"
            )
        if self._checked:
            return
        own = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        again = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten().double()
                for p, g in zip(parameters, self._repeat(parameters), strict=True)
            ]
        )
        cosine = float(torch.cosine_similarity(own, again, dim=0))
        if cosine < _SAME and bool(own.any()):
            raise RuntimeError(
                "SAM repeated the calls of model and criterion that were backpropagated, and their gradient is not the "
                f"one in p.grad (cosine {cosine:.3f}). The whole loss has to come out of the criterion; the model's "
                "randomness has to be torch's; and between backward() and step(), gradients may be scaled, not changed "
                "entry by entry"
            )
        self._checked = math.isfinite(cosine)

    # ---------------------------------------------------------------- recording

    def _watch(self, loss: Tensor) -> None:
        """Wait for a result of the criterion to be backpropagated."""
        call, of_criterion = self._calls.latest(), self._criterion_calls.latest()
        if call is not None and of_criterion is not None:
            loss.register_hook(functools.partial(self._note, call, of_criterion))  # type: ignore[no-untyped-call]

    def _note(self, call: RecordedCall, of_criterion: RecordedCall, gradient: Tensor) -> None:
        """Remember a pass that is being backpropagated; the first since gradients were cleared starts anew."""
        backward = torch._C._current_graph_task_id()  # one backward may come by here several times
        if backward != self._backward and all(p.grad is None for p in self._all_parameters()):
            self._passes = []
        self._backward = backward
        self._passes.append(_Pass(call, of_criterion, self._criterion, gradient.detach().clone()))

    def _forget(self) -> None:
        """Let go of the batch."""
        self._passes = []
        self._calls.forget()
        self._criterion_calls.forget()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell a GradScaler, which asks before it steps an optimizer, to unscale the gradients itself."""
        if self._scaler is None:
            raise RuntimeError("SAM needs to know by what the loss is scaled: give it grad_scaler=, the GradScaler")
        return False

    # ---------------------------------------------------------------- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict with an entry ``"sam"`` added, plain numbers.

        The wrapped optimizer alone can load it as well.
        """
        return {**self.base.state_dict(), "sam": {"steps": self._steps, "skipped": self.skipped}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of SAM, or one of the bare wrapped optimizer, which counts steps from nought then."""
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "sam"})
        self._load_own(state_dict.get("sam", {"steps": 0, "skipped": 0}))

    def _load_own(self, own: Mapping[str, int]) -> None:
        self._forget()
        self._steps, self._skipped = own["steps"], torch.tensor(own["skipped"])

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.base,
            "model": self.model,
            "criterion": self._criterion,
            "options": {"rho": self._rho, "grad_scaler": self._scaler},
            "own": self.state_dict()["sam"],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state:
            super().__setstate__(state)
            return
        SAM.__init__(self, state["optimizer"], state["model"], state["criterion"], **state["options"])
        self._load_own(state["own"])


def ascent(gradients: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The step of length rho along a gradient, over all parameters together [Foret et al., eq. 2, p = 2]."""
    norm = get_total_norm(gradients)
    factor = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return list(torch._foreach_mul(list(gradients), factor))


@contextlib.contextmanager
def moved(parameters: Sequence[nn.Parameter], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Run a block with the parameters moved, and put them back to the bit."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        try:
            torch._foreach_add_(list(parameters), list(offsets))
            yield
        finally:
            torch._foreach_copy_(list(parameters), before)


@dataclass(frozen=True)
class _Pass:
    """A call of the model and one of the criterion on its output, backpropagated.

    Attributes:
        call: That of the model.
        of_criterion: That of the criterion.
        criterion: The criterion.
        gradient: Of what was backpropagated, with respect to the criterion's result.
    """

    call: RecordedCall
    of_criterion: RecordedCall
    criterion: nn.Module
    gradient: Tensor

    def loss(self, output: Any) -> Tensor:
        """Return the criterion's result on an output of the model."""
        with self.of_criterion.conditions():
            return self.of_criterion.with_other_output(self.criterion, self.of_criterion.batch_size)(output)


class _LossHook:
    """A forward hook on the criterion that hands its results to the optimizer; copies of the criterion do not."""

    def __init__(self, owner: Callable[[], SAM | None] = lambda: None) -> None:
        self._owner = owner

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, it would tie compiled code to the optimizer
    def __call__(self, module: nn.Module, args: tuple[Any, ...], loss: Any) -> None:
        owner = self._owner()
        if owner is not None and isinstance(loss, Tensor) and loss.requires_grad:
            owner._watch(loss)

    def __deepcopy__(self, memo: dict[int, Any]) -> _LossHook:
        return _LossHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_LossHook, ())


def _moves_next(optimizer: SAM | None) -> bool:
    """Tell whether the next step will have to repeat what is called now."""
    return optimizer is not None and optimizer._distance() > 0


def _check_rho(rho: float) -> float:
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho!r} must be a number >= 0, or a function of the step count")
    return rho
