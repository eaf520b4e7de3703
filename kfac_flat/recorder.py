"""Remembering a module's calls, so that they can be repeated elsewhere: same arguments, randomness and precision."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_flat.nested import batch_size, map_tensors, tensors


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module: its arguments and the state of the random generators and of autocast at its start."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    device: torch.device
    random_states: dict[torch.device, Tensor]
    autocast: dict[str, Any]

    @classmethod
    def now(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall:
        """Record a call of the module that is about to happen."""
        device = next((t.device for t in tensors((args, kwargs))), torch.device("cpu"))
        states = {torch.device("cpu"): torch.get_rng_state()}
        if device.type == "cuda":
            states[device] = torch.cuda.get_rng_state(device)
        autocast = {
            "device_type": device.type,
            "enabled": torch.is_autocast_enabled(device.type),
            "dtype": torch.get_autocast_dtype(device.type),
        }
        # Copies, since the module may work in place; without the graph that may lead to them, which must not live on.
        args, kwargs = map_tensors(lambda t: t.detach().clone(), (args, kwargs))
        return cls(args, kwargs, module.training, device, states, autocast)

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor argument."""
        return batch_size((self.args, self.kwargs))

    def first(self, examples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every tensor that has an axis of examples cut to the first ``examples``."""
        size = self.batch_size
        if examples >= size:
            return self.args, dict(self.kwargs)
        cut = map_tensors(lambda t: t[:examples] if t.dim() and len(t) == size else t, (self.args, self.kwargs))
        return cut[0], cut[1]

    def with_other_output(self, criterion: nn.Module, examples: int) -> Callable[[Any], Tensor]:
        """Return the criterion at the targets of this call of it, those of the first examples, as a function.

        The function takes an output of the model, which must be of the shape of the one that the criterion was called
        with, and returns what the criterion does.
        """
        args, kwargs = self.first(examples)
        seen = kwargs.pop("input", args[0] if args else None)  # the model's output, by name or by position

        def loss(output: Any) -> Tensor:
            if getattr(output, "shape", None) != getattr(seen, "shape", ()):
                raise ValueError(
                    "the criterion was called on something else than the model's output, of shape "
                    f"{list(getattr(seen, 'shape', ()))} and not {list(getattr(output, 'shape', ()))}: "
                    "put what lies between into the model or into the criterion"
                )
            result: Tensor = criterion.forward(output, *args[1:], **kwargs)
            return result

        return loss

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """Run a block under the call's randomness and autocast, and leave both afterwards as they were before it."""
        devices = [device for device in self.random_states if device.type == "cuda"]
        with torch.random.fork_rng(devices=devices), torch.autocast(**self.autocast):
            for device, state in self.random_states.items():
                if device.type == "cuda":
                    torch.cuda.set_rng_state(state, device)
                else:
                    torch.set_rng_state(state)
            yield


class CallRecorder:
    """A forward pre-hook that keeps the last call made with gradients enabled while ``wanted()`` says so.

    A call in train mode is not displaced by one in eval mode: that is somebody looking at the model in between.
    Copies of the module carry a recorder that records nothing: their calls are not the original's.
    """

    def __init__(self, wanted: Callable[[], bool] | None = None) -> None:
        self._wanted = wanted
        self.last: RecordedCall | None = None

    @classmethod
    def attach(cls, module: nn.Module, wanted: Callable[[], bool], owner: object) -> CallRecorder:
        """Put a recorder on a module while its owner lives, to which ``wanted`` must not refer strongly."""
        recorder = cls(wanted)
        handle = module.register_forward_pre_hook(recorder, with_kwargs=True)
        weakref.finalize(owner, handle.remove)
        return recorder

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, it would tie compiled code to the optimizer
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call, as ``register_forward_pre_hook`` announces it."""
        if self._wanted is None or not torch.is_grad_enabled() or not self._wanted():
            return
        if self.last is None or module.training or not self.last.training:
            self.last = RecordedCall.now(module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallRecorder:
        return CallRecorder()

    def __reduce__(self) -> tuple[Any, ...]:
        return (CallRecorder, ())
