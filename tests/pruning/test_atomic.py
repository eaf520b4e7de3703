"""A step that fails anywhere has not happened: a failure is injected at every stage, and everything is as before."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn, optim

import kfac_flat
from kfac_flat import FlatKFAC, NeuronPruner
from tests.pruning.nets import Case, vectors
from tests.pruning.test_surgery import Setup, assert_same, everything, train

LIBRARY = str(Path(kfac_flat.__file__).parent)
ERRORS = (RuntimeError, MemoryError, KeyboardInterrupt)


class Event(NamedTuple):
    """The beginning or end of a call, where it stands in the code."""

    kind: str
    file: str
    function: str
    line: int
    called: str


class Injection:
    """Raises at the ``at``-th beginning or end of a call of, or out of, the library; ``at=0`` only listens.

    Counted are the library's own functions, everything written in C that they call (which is how tensors are copied,
    selected and dictionaries updated), and the exchange of tensors. Not counted is what enters and leaves a ``with``
    block, and the pauses of generators, where Python itself may lose an exception.
    """

    def __init__(self, at: int = 0, error: type[BaseException] = RuntimeError) -> None:
        self._at, self._error = at, error
        self.events: list[Event] = []
        self.raised = False

    def __call__(self, frame: FrameType, kind: str, argument: Any) -> None:
        code = frame.f_code
        is_swap = code.co_name == "swap_tensors" and not kind.startswith("c_")
        if not is_swap and not code.co_filename.startswith(LIBRARY):
            return
        called = getattr(argument, "__name__", "") if kind.startswith("c_") else ""
        paused = kind in ("call", "return") and code.co_flags & inspect.CO_GENERATOR
        if called in ("__enter__", "__exit__") or paused:
            return
        self.events.append(Event(kind, code.co_filename, code.co_name, frame.f_lineno, called))
        if len(self.events) == self._at:
            sys.setprofile(None)
            self.raised = True
            raise self._error("injected")

    def during(self, call: Callable[[], Any]) -> None:
        """Call something under supervision; what it raises comes out."""
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(None)


def all_there_is(model: nn.Module, optimizer: optim.Optimizer, pruner: NeuronPruner) -> dict[str, Any]:
    """Values, and for what holds them the identity: the same objects in the same places."""
    held = [pruner, *([optimizer, optimizer._tracker, optimizer._calls] if isinstance(optimizer, FlatKFAC) else [])]
    parameters = list(model.parameters())
    return {
        "values": everything(model, optimizer, pruner),
        "parameters": [id(p) for p in parameters],
        "buffers": [id(b) for b in model.buffers()],
        "gradients": [id(p.grad) for p in parameters],
        "strides": [(p.stride(), p.grad.stride()) for p in parameters],
        "held": [{name: id(value) for name, value in vars(holder).items()} for holder in held],
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "hooks": [list(m._forward_pre_hooks) + list(m._forward_hooks) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def build(kfac: bool) -> Setup:
    model, x = Case(small, vectors).build()
    y = torch.arange(len(x)) % 3
    optimizer: optim.Optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kfac:
        optimizer = FlatKFAC(optimizer, model, every=2)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1)
    model[0].register_forward_hook(lambda *_: None)
    train(model, optimizer, x, y, 2)
    model(x)
    return model, optimizer, pruner, x, y


def committed(events: list[Event]) -> int:
    """Return the number of the first event after which all is done."""
    return len(events) - next(
        i for i, e in enumerate(reversed(events)) if (e.kind, e.function) == ("return", "make_all")
    )


def compared_with_code(events: list[Event]) -> set[int]:
    """Return the events while the model's code is run without data: if that fails, it is not compared, and no more."""
    inside, found = False, set()
    for i, event in enumerate(events):
        if event.function == "first_difference" and event.kind in ("call", "return"):
            inside = event.kind == "call"
        if inside:
            found.add(i)
    return found


def stages(events: list[Event]) -> list[int]:
    """Every event while the prepared changes are made, and before that one beginning of each kind of call."""
    begin = max(i for i, event in enumerate(events) if (event.kind, event.function) == ("call", "make_all"))
    compared = compared_with_code(events)
    last = {
        e._replace(line=0): i
        for i, e in enumerate(events[:begin])
        if e.kind in ("call", "c_call") and i not in compared
    }
    return [i + 1 for i in (*sorted(last.values()), *range(begin, committed(events) - 1))]


def assert_fails_without_a_trace(call: Callable[[], Any], run: Setup, events: list[Event]) -> int:
    model, optimizer, pruner, _, _ = run
    before = all_there_is(model, optimizer, pruner)
    failures = 0
    for at, error in zip(stages(events), cycle(ERRORS)):
        injection = Injection(at, error)
        with pytest.raises((*ERRORS, TypeError, ValueError)):
            injection.during(call)
        assert injection.raised, f"{events[at - 1]} did not come again"
        assert_same(all_there_is(model, optimizer, pruner), before)
        failures += 1
    return failures


def assert_equal_runs(run: Setup, other: Setup) -> None:
    """Assert that two runs are the same bit by bit, now and after more training."""
    for _ in range(2):
        assert_same(everything(*run[:3]), everything(*other[:3]))
        assert_same(outcome(run), outcome(other))


def outcome(run: Setup) -> list[float]:
    model, optimizer, _, x, y = run
    return train(model, optimizer, x, y, 3)


@pytest.mark.parametrize("kfac", [False, True])
def test_a_step_that_fails_at_any_stage_has_not_happened_and_can_be_made_again(kfac: bool) -> None:
    run, undisturbed = build(kfac), build(kfac)
    listening = Injection()
    undisturbed[2].plan()  # what happens at the first call only, such as an import, has happened
    listening.during(undisturbed[2].step)
    plan = run[2].plan()
    failures = assert_fails_without_a_trace(run[2].step, run, listening.events)
    assert failures > 100
    report = run[2].step()
    assert report.widths_after == plan.widths_after == undisturbed[2].widths
    assert_equal_runs(run, undisturbed)


def test_loading_a_state_that_fails_at_any_stage_has_not_happened_and_can_be_made_again() -> None:
    source = build(kfac=False)
    source[2].step()
    state = copy.deepcopy(source[2].state_dict())
    run, undisturbed = build(kfac=False), build(kfac=False)
    listening = Injection()
    undisturbed[2].plan()
    listening.during(lambda: undisturbed[2].load_state_dict(state))
    run[2].plan()
    assert_fails_without_a_trace(lambda: run[2].load_state_dict(state), run, listening.events)
    run[2].load_state_dict(state)
    assert_equal_runs(run, undisturbed)


def test_the_end_of_an_epoch_without_a_removal_happens_wholly_or_not_at_all() -> None:
    run, undisturbed = build(kfac=False), build(kfac=False)
    for _, _, pruner, _, _ in (run, undisturbed):
        pruner._schedule = type(pruner._schedule)(2, 1, 1)
    listening = Injection()
    listening.during(undisturbed[2].step)
    assert_fails_without_a_trace(run[2].step, run, listening.events)
    with pytest.raises(KeyboardInterrupt):  # too late: the step has happened
        Injection(committed(listening.events), KeyboardInterrupt).during(run[2].step)
    assert len(run[2].history) == 1
    assert_equal_runs(run, undisturbed)


def test_the_injection_reaches_every_part_of_a_cut() -> None:
    listening = Injection()
    listening.during(build(kfac=True)[2].step)
    seen = {event.called if event.kind.startswith("c_") else event.function for event in listening.events}
    assert seen >= {"swap_tensors", "index_select", "clone", "update", "append", "setattr", "prepare_cut", "make_all"}
    assert {event.kind for event in listening.events} == {"call", "return", "c_call", "c_return"}
