"""Remembering a module's calls, so that they can be repeated elsewhere: same arguments, randomness and precision."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kfac_flat.nested import batch_size, holds_packed, lengths, map_tensors, tensors


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module: its arguments, the state of the random generators and of autocast at its start.

    Once it is over, the lengths of what it returned as well.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool
    device: torch.device
    random_states: dict[torch.device, Tensor]
    autocast: dict[str, Any]
    output_lengths: tuple[int, ...] = ()

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

    @classmethod
    def joined(cls, calls: Sequence[RecordedCall]) -> RecordedCall:
        """Return one call on all examples of several, under the randomness of the first.

        Where there is no such call, as for images of different sizes, the last one is returned.
        """
        if len(calls) == 1:
            return calls[0]
        sizes = [call.batch_size for call in calls]
        try:
            *_, args, kwargs = _join([(c.training, c.device, c.autocast, c.args, c.kwargs) for c in calls], sizes)
        except _UnlikeError:
            return calls[-1]
        output_lengths = tuple(map(sum, zip(*(call.output_lengths for call in calls), strict=False)))
        return replace(calls[0], args=args, kwargs=kwargs, output_lengths=output_lengths)

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor argument."""
        return batch_size((self.args, self.kwargs))

    def first(self, examples: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with every tensor that has an axis of examples cut to the first ``examples``.

        Packed sequences are returned whole.
        """
        size = self.batch_size
        if examples >= size or holds_packed((self.args, self.kwargs)):
            return self.args, dict(self.kwargs)
        cut = map_tensors(lambda t: t[:examples] if t.dim() and len(t) == size else t, (self.args, self.kwargs))
        return cut[0], cut[1]

    def has_its_share(self, output: Any, examples: int) -> bool:
        """Tell whether an output may be that of the first examples: its length is to this call's as theirs to its own.

        It is not where the first axis of the arguments is one of time.
        """
        pairs = zip(lengths(output), self.output_lengths, strict=False)
        return not self.output_lengths or any(seen * self.batch_size == whole * examples for seen, whole in pairs)

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


class _UnlikeError(ValueError):
    """Arguments of several calls cannot be those of one."""


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Concatenate tensors that have an axis of examples, inside of whatever holds them; all else must be equal."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _UnlikeError
    if isinstance(first, Tensor):
        if all(t.dim() and len(t) == size for t, size in zip(values, sizes, strict=True)):
            if len({(t.shape[1:], t.dtype, t.layout) for t in values}) > 1:
                raise _UnlikeError
            return torch.cat(list(values))
        if all(torch.equal(t, first) for t in values):
            return first
        raise _UnlikeError
    if isinstance(first, PackedSequence):
        raise _UnlikeError
    if isinstance(first, (list, tuple)):
        if any(len(value) != len(first) for value in values):
            raise _UnlikeError
        items = [_join(items, sizes) for items in zip(*values, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise _UnlikeError
        changed = copy.copy(first)
        for key in first:
            changed[key] = _join([value[key] for value in values], sizes)
        return changed
    if not all(value is first or _equal(value, first) for value in values):
        raise _UnlikeError
    return first


def _equal(a: Any, b: Any) -> bool:
    """Compare what is no tensor, arrays by all of their items."""
    if getattr(a, "shape", None) != getattr(b, "shape", None):
        return False
    equal = a == b
    return bool(equal.all() if hasattr(equal, "all") else equal)


class RecordedGraph:
    """A recorded call together with what has become of it: whether a gradient has come back, and whether one may."""

    def __init__(self, call: RecordedCall, output: Any, place: int, keep_output: bool = False) -> None:
        self.call = replace(call, output_lengths=lengths(output))
        self.place = place  # among the calls of the model
        self.output = map_tensors(lambda t: t.detach().clone(), output) if keep_output else None
        self.has_gradient = False
        self._awaited: weakref.ref[Any] | None = None
        results = [t for t in tensors(output) if t.grad_fn is not None]
        self._results = [weakref.ref(t) for t in results]

        def note(gradient: Tensor) -> None:
            self.has_gradient = True

        for t in results:
            t.register_hook(note)
        if results:
            self._awaited = weakref.ref(note)  # which lives as long as the graph does

    def returned(self, identities: set[int]) -> bool:
        """Tell whether one of these tensors, given by their ids, is a result of the call."""
        return any(id(result()) in identities for result in self._results)

    def may_matter(self, training: bool) -> bool:
        """Tell whether the call is to be kept when another one is made, in train mode or not."""
        if self._awaited is None:  # the output holds no tensor that could tell
            return self.call.training and not training
        return self.has_gradient or self._awaited() is not None


class CallRecorder:
    """Hooks that keep the calls made with gradients enabled while ``wanted()`` says so, until they are forgotten.

    What counts are the calls that a gradient has come back to: the micro-batches of a step. Somebody who looks at the
    model in between leaves no trace. Copies of the module get hooks that take themselves off: their calls are not the
    original's.
    """

    def __init__(self, wanted: Callable[[], bool] | None = None, source: CallRecorder | None = None) -> None:
        self._wanted = wanted
        self._source = source
        self._place = 0  # of the call made last
        self._begun: RecordedCall | None = None
        self.keeps_outputs = False
        self.graphs: list[RecordedGraph] = []

    @classmethod
    def attach(
        cls, module: nn.Module, wanted: Callable[[], bool], owner: object, source: CallRecorder | None = None
    ) -> CallRecorder:
        """Put a recorder on a module while its owner lives, to which ``wanted`` must not refer strongly.

        Calls on what the module watched by ``source`` returned count in the order in which that was called.
        """
        recorder = cls(wanted, source)
        before = module.register_forward_pre_hook(recorder.begin, with_kwargs=True)
        after = module.register_forward_hook(recorder.end)
        for handle in (before, after):
            weakref.finalize(owner, handle.remove)
        return recorder

    def latest(self) -> RecordedCall | None:
        """Return the call made last, whatever has become of it."""
        return self.graphs[-1].call if self.graphs else None

    def last(self, examples: int | None = None) -> RecordedCall | None:
        """All calls joined that a gradient has come back to; if there is none, the last one, in train mode if any.

        Args:
            examples: If the calls joined have another number of them, the last call alone is returned.
        """
        with_gradient = self._with_gradient()
        if with_gradient:
            joined = RecordedCall.joined(with_gradient)
            return joined if examples in (None, joined.batch_size) else with_gradient[-1]
        calls = [graph.call for graph in self.graphs]
        return next((call for call in reversed(calls) if call.training), calls[-1] if calls else None)

    def last_alone(self) -> RecordedCall | None:
        """Return the last of the calls that :meth:`last` joins."""
        return next(reversed(self._with_gradient()), None)

    def _with_gradient(self) -> list[RecordedCall]:
        """Return the calls that a gradient has come back to, in the order of those of the model."""
        return [graph.call for graph in sorted(self.graphs, key=lambda graph: graph.place) if graph.has_gradient]

    def forget(self) -> None:
        """Let go of all calls."""
        self._begun, self.graphs = None, []

    def forget_finished(self) -> None:
        """Let go of the calls whose gradient has come, and is about to be cleared."""
        self.graphs = [graph for graph in self.graphs if not graph.has_gradient]

    # Traced, these would tie compiled code to the optimizer.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record a call, as ``register_forward_pre_hook`` announces it."""
        self._begun = None
        if self._wanted is None:
            self._take_off(module)
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._wanted():  # no call of a tracer's
            self.graphs = [graph for graph in self.graphs if graph.may_matter(module.training)]
            self._place = self._place_of(args, kwargs)
            self._begun = RecordedCall.now(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Wait for the gradient of a call's output, as ``register_forward_hook`` announces it."""
        if self._begun is not None:
            self.graphs.append(RecordedGraph(self._begun, output, self._place, self.keeps_outputs))
            self._begun = None

    def _place_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the place of a call: that of the source's call which returned its arguments, if that can be told."""
        if self._source is None:
            return self._place + 1
        given = {id(t) for t in tensors((args, kwargs))}
        return next((graph.place for graph in self._source.graphs if graph.returned(given)), self._source._place)

    def _take_off(self, module: nn.Module) -> None:
        """Remove the hooks of a recorder that records nothing."""
        tables = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks)
        own = [key for hooks in tables for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]
        for hooks in tables:
            for key in own:
                hooks.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallRecorder:
        return CallRecorder()

    def __reduce__(self) -> tuple[Any, ...]:
        return (CallRecorder, ())
