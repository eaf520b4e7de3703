"""Two processes with DistributedDataParallel cut like one, at the same time, or not at all."""

from __future__ import annotations

import copy
import functools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_flat import CutError, NeuronPruner, rewrap
from kfac_flat.distributed import Agreement
from kfac_flat.pruning import scheduler
from kfac_flat.pruning.graph import NeuronGraph
from tests.processes import RunInProcesses, Scenario
from tests.pruning.masking import distance
from tests.pruning.nets import CASES, call

RANKS = 2


# ---------------------------------------------------------------- training


@dataclass
class Run:
    """A residual network in float64 and all that trains it, on all of the data or on a rank's share of it."""

    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: NeuronPruner
    x: Tensor
    y: Tensor

    @classmethod
    def start(
        cls, rank: int | None = None, ddp: dict[str, Any] | None = None, adam: bool = False, **options: Any
    ) -> Run:
        model, x = CASES["residual"].build(n=12)
        model.eval()  # the statistics of half a batch are not those of the whole
        y = torch.arange(len(x)) % 3
        if rank is not None:
            x, y = x[rank::RANKS], y[rank::RANKS]
        forward = model if ddp is None else DistributedDataParallel(model, **ddp)
        make = functools.partial(torch.optim.AdamW, lr=0.01) if adam else functools.partial(torch.optim.SGD, lr=0.05)
        optimizer = make(forward.parameters(), **({} if adam else {"momentum": 0.9}))
        options = {"target": 0.5, "start": 1, "every": 1, "events": 2} | options
        return cls(model, forward, optimizer, NeuronPruner(model, optimizer, x[:1], **options), x, y)

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(call(self.forward, self.x), self.y).backward()
            self.optimizer.step()

    def end_epoch(self) -> dict[str, list[int]]:
        """Step the pruner; returns what went."""
        if self.forward is self.model:
            report = self.pruner.step()
        else:
            with rewrap(self.forward):
                report = self.pruner.step()
        return {name: gone.tolist() for name, gone in report.removed.items()}

    def go(self, epochs: int = 3) -> dict[str, Any]:
        removed = []
        for _ in range(epochs):
            self.train()
            removed.append(self.end_epoch())
        self.train()
        return {"removed": removed, "parameters": [p.detach() for p in self.model.parameters()]}

    def state(self) -> list[Any]:
        """All that a cut may change, as it is now."""
        states = [self.model.state_dict(), self.optimizer.state_dict(), self.pruner.state_dict()]
        grads = [None if p.grad is None else p.grad for p in self.model.parameters()]
        return copy.deepcopy([*states, grads, str(self.model), len(self.pruner.history)])


def same(a: Any, b: Any) -> bool:
    """Tell whether nested values are equal, tensors bit by bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def refused_without_a_trace(trained: Run, step: Callable[[], Any]) -> str:
    """Expect the cut to fail; returns the error, once nothing is seen to have changed."""
    before = trained.state()
    try:
        step()
    except (CutError, MemoryError) as error:
        assert same(trained.state(), before)
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the cut has been made")


def _trajectory(rank: int, ddp: dict[str, Any], adam: bool) -> dict[str, Any]:
    return Run.start(rank, ddp, adam).go()


@pytest.mark.parametrize(
    ("ddp", "adam"),
    [
        ({}, False),
        ({"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005}, True),
        ({"find_unused_parameters": True}, False),
        ({"static_graph": True, "gradient_as_bucket_view": True}, False),
    ],
    ids=["plain", "views_of_small_buckets", "unused", "static"],
)
def test_two_processes_cut_the_same_neurons_and_train_on_like_one(
    ddp: dict[str, Any], adam: bool, run: RunInProcesses
) -> None:
    found = run(functools.partial(_trajectory, ddp=ddp, adam=adam))
    whole = Run.start(adam=adam).go()
    half = Run.start(rank=0, adam=adam).go()
    assert [bool(gone) for gone in whole["removed"]] == [True, True, False]
    assert half["removed"] != whole["removed"], "each rank's share tells the same, so the comparison means nothing"
    for of_rank in found:
        assert of_rank["removed"] == whole["removed"]
        assert distance(of_rank["parameters"], whole["parameters"]) < 1e-9
    assert same(found[0]["parameters"], found[1]["parameters"])


def _forgotten(rank: int) -> tuple[str, dict[str, Any]]:
    trained = Run.start(rank, {})
    trained.train()
    message = refused_without_a_trace(trained, trained.pruner.step)
    trained.end_epoch()
    return message, trained.go(epochs=1)


def test_a_wrapper_that_was_not_told_stops_the_cut_on_every_rank(run: RunInProcesses) -> None:
    whole = Run.start()
    whole.train()
    whole.end_epoch()
    expected = whole.go(epochs=1)
    for message, found in run(_forgotten):
        assert "lets go of it within kfac_flat.rewrap(wrapper)" in message
        assert found["removed"] == expected["removed"]
        assert distance(found["parameters"], expected["parameters"]) < 1e-9


def _out_of_memory(*args: Any) -> None:
    raise MemoryError("no memory left")


def _failing(rank: int, at: str) -> tuple[str, dict[str, Any]]:
    trained = Run.start(rank, {})
    trained.train()
    with pytest.MonkeyPatch.context() as patch:
        alive = None
        if rank == 1 and at == "exchanging":
            alive = call(trained.model, trained.x)  # torch exchanges no parameter that a graph holds
        elif rank == 1:
            owner, name = (scheduler, "Surgery") if at == "preparing" else (NeuronGraph, "measure")
            patch.setattr(owner, name, _out_of_memory)
        message = refused_without_a_trace(trained, trained.end_epoch)
        del alive
    trained.end_epoch()
    return message, trained.go(epochs=1)


@pytest.mark.parametrize("at", ["choosing", "preparing", "exchanging"])
def test_a_rank_that_fails_leaves_every_rank_uncut_and_the_next_attempt_succeeds(at: str, run: RunInProcesses) -> None:
    (other, first), (own, second) = run(functools.partial(_failing, at=at))
    reason = "cannot be cut while something else holds it" if at == "exchanging" else "MemoryError: no memory left"
    assert reason in own
    assert other.startswith("CutError: not every process could make the cut, so none has made it: rank 1:")
    assert reason in other
    assert first["removed"] == second["removed"]
    assert same(first["parameters"], second["parameters"])


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(rank: int, at: str) -> str:
    trained = Run.start(rank, {})
    trained.train()
    if rank == 1:
        target = NeuronPruner if at == "_scores" else Agreement  # on_cut: its tensors have been exchanged by then
        pytest.MonkeyPatch().setattr(target, at, _die)
    return refused_without_a_trace(trained, trained.end_epoch)


@pytest.mark.parametrize("at", ["_scores", "on_cut"])
def test_a_rank_that_dies_leaves_the_others_uncut(at: str, run: RunInProcesses) -> None:
    message, nothing = run(functools.partial(_dying, at=at))
    assert nothing is None
    assert message.startswith("CutError: a process is gone or has not come to step(), so this one leaves its model")


def _unreduced(rank: int) -> str:
    trained = Run.start(rank)
    trained.train()
    return refused_without_a_trace(trained, trained.end_epoch)


def _wanting_more(rank: int) -> str:
    trained = Run.start(rank, {}, target=0.5 + 0.1 * rank)
    trained.train()
    return refused_without_a_trace(trained, trained.end_epoch)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [(_unreduced, "ranks 1 have scored the neurons unlike rank 0"), (_wanting_more, "ranks 1 would remove other")],
)
def test_ranks_that_would_cut_differently_are_refused(scenario: Scenario, expected: str, run: RunInProcesses) -> None:
    for message in run(scenario):
        assert expected in message


def _noisy(rank: int) -> dict[str, list[int]]:
    trained = Run.start(rank, {})
    trained.train()
    groups = len(trained.pruner._groups.ids)
    scores = [1 + 1e-6 * (i if rank == 0 else -i) for i in range(groups)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.pruner, "_scores", lambda: scores)
        expected = trained.pruner.plan().removed
        removed = trained.end_epoch()
    assert (removed == {name: gone.tolist() for name, gone in expected.items()}) == (rank == 0)
    return removed


def test_where_scores_differ_by_rounding_all_ranks_go_by_those_of_rank_0(run: RunInProcesses) -> None:
    first, second = run(_noisy)
    assert first == second


def _counted(rank: int) -> list[int]:
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        gather, seen = dist.all_gather_object, []
        patch.setattr(dist, "all_gather_object", lambda *args: (seen.append(args), gather(*args)))
        trained = Run.start(rank, {}, start=2, every=2)
        for _ in range(5):
            trained.train()
            trained.pruner.plan()
            trained.end_epoch()
            counts.append(len(seen))
            seen.clear()
    return counts


def test_processes_talk_to_each_other_only_when_a_removal_is_due(run: RunInProcesses) -> None:
    assert run(_counted) == [[0, 2, 0, 2, 0]] * RANKS


# ---------------------------------------------------------------- the wrapper

ONE_PROCESS = pytest.mark.usefixtures("process_group")


def wrapped(**settings: Any) -> tuple[Run, DistributedDataParallel]:
    trained = Run.start(ddp=settings)
    assert isinstance(trained.forward, DistributedDataParallel)
    return trained, trained.forward


@ONE_PROCESS
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {"static_graph": False, "bucket_bytes_cap_default": True}),
        ({"dim": 1, "bucket_cap_mb": 3}, {"dim": 1, "bucket_bytes_cap": 3 * 2**20, "bucket_bytes_cap_default": False}),
        ({"static_graph": True, "gradient_as_bucket_view": True}, {"static_graph": True}),
        ({"gradient_as_bucket_view": True, "find_unused_parameters": True}, {"find_unused_parameters": True}),
    ],
)
def test_the_wrapper_keeps_its_settings(settings: dict[str, Any], kept: dict[str, Any]) -> None:
    trained, ddp = wrapped(process_group=dist.new_group([0]), **settings)
    ddp.broadcast_buffers = False
    names = (*kept, "process_group", "broadcast_buffers", "gradient_as_bucket_view", "bucket_bytes_cap")
    before = {name: getattr(ddp, name) for name in names}
    trained.train()
    assert trained.end_epoch()
    assert {name: getattr(ddp, name) for name in names} == before
    assert kept.items() <= before.items()
    trained.train()


@ONE_PROCESS
def test_the_wrapper_keeps_its_mode_and_its_hooks() -> None:
    trained, ddp = wrapped()
    seen: list[str] = []
    handle = ddp.register_forward_hook(lambda *args: seen.append("forward"))

    def halve(state, bucket):  # type: ignore[no-untyped-def]  # torch reads its annotations
        seen.append(state)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    ddp.register_comm_hook("reduced", halve)
    ddp.eval()
    trained.train()
    assert trained.end_epoch()
    assert not ddp.training
    seen.clear()
    trained.optimizer.zero_grad()
    ddp(trained.x).square().sum().backward()
    assert seen == ["forward", "reduced"]
    halves = [p.grad for p in trained.model.parameters()]
    trained.optimizer.zero_grad()
    trained.model(trained.x).square().sum().backward()
    assert distance([2 * half for half in halves], [p.grad for p in trained.model.parameters()]) < 1e-9
    handle.remove()
    ddp(trained.x)
    assert seen == ["forward", "reduced"]


@ONE_PROCESS
def test_gradients_accumulate_across_a_cut_inside_the_wrappers_buckets() -> None:
    trained, ddp = wrapped(gradient_as_bucket_view=True)
    trained.train()
    before = [p.grad.clone() for p in trained.model.parameters()]
    with rewrap(ddp):
        pass
    ddp(trained.x).square().sum().backward()
    both = [p.grad.clone() for p in trained.model.parameters()]
    trained.optimizer.zero_grad()
    trained.model(trained.x).square().sum().backward()
    assert distance(both, [g + p.grad for g, p in zip(before, trained.model.parameters(), strict=True)]) < 1e-9


@ONE_PROCESS
def test_a_wrapper_that_has_let_go_refuses_to_run() -> None:
    trained, ddp = wrapped()
    with rewrap(ddp):
        for grad in (True, False):
            with pytest.raises(RuntimeError, match="would not reduce their gradients"), torch.set_grad_enabled(grad):
                ddp(trained.x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDataParallel, "_ddp_init_helper", _out_of_memory)
        with pytest.raises(MemoryError), rewrap(ddp):
            pass
    with pytest.raises(RuntimeError, match="would not reduce their gradients"):
        ddp(trained.x)


@ONE_PROCESS
def test_what_cannot_be_made_anew_is_refused_and_goes_on() -> None:
    trained, ddp = wrapped()
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    with pytest.raises(ValueError, match="with a built-in communication hook cannot be made anew"), rewrap(ddp):
        raise AssertionError("the wrapper has let go")
    trained.train()


@ONE_PROCESS
@pytest.mark.parametrize("compiled", [False, True])
def test_rewrap_takes_nothing_but_the_wrapper(compiled: bool) -> None:
    trained, ddp = wrapped()
    other = torch.compile(ddp, backend="eager") if compiled else trained.model
    with pytest.raises(TypeError, match="takes the DistributedDataParallel around the model, not"), rewrap(other):
        raise AssertionError("the wrapper has let go")
    trained.train()
