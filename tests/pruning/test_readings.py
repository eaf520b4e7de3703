"""Theta is read at some of an epoch's steps: enough, spread evenly, the same after a resume, and none for nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn import functional as F

from baselines import APoZPruner, TaylorPruner
from baselines.hybrid import HybridPruner
from kfac_flat import NeuronPruner
from kfac_flat.pruning.readings import Readings

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4).cos()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def build(kind: type[NeuronPruner] = NeuronPruner, **options: Any) -> tuple[nn.Module, optim.Optimizer, NeuronPruner]:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    defaults = {"target": 0.5, "start": 4, "every": 2, "events": 2, "readings": 2}
    return model, optimizer, kind(model, optimizer, X, **{**defaults, **options})


def train(model: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X + step), torch.arange(8) % 3).backward()
        optimizer.step()


def chosen(readings: Readings, steps: int) -> list[int]:
    return [step for step in range(steps) if readings.next()]


@given(n=st.integers(1, 40), steps=st.integers(1, 2000))
def test_an_epoch_has_at_least_as_many_readings_as_asked_for_evenly_spread_and_fewer_than_twice_as_many(
    n: int, steps: int
) -> None:
    readings = Readings(n)
    first = chosen(readings, steps)
    readings = readings.ended()
    steady = chosen(readings, steps)
    assert min(n, steps) <= len(steady) < 2 * n
    assert steady[0] == 0
    assert len({b - a for a, b in itertools.pairwise(steady)}) <= 1
    assert first[: 2 * n] == list(range(min(steps, 2 * n)))
    assert len(first) >= min(n, steps)


@given(steps=st.integers(1, 500))
def test_none_reads_every_step(steps: int) -> None:
    assert chosen(Readings(None, before=300), steps) == list(range(steps))


def test_theta_is_the_mean_over_the_chosen_steps() -> None:
    model, optimizer, pruner = build()
    every = NeuronPruner(model, optimizer, X, target=0.5, start=4, readings=None)
    train(model, optimizer, 7)
    pruner.step(), every.step()
    sums = [every._saliency.total.clone()]
    before = pruner._saliency.total.clone(), pruner._saliency.steps.clone()
    for _ in range(7):
        train(model, optimizer, 1)
        sums.append(every._saliency.total.clone())
    of_steps = torch.stack(sums).diff(dim=0)
    assert float((of_steps[0] - of_steps[3]).abs().max()) > 1e-6  # the steps differ
    torch.testing.assert_close(pruner._saliency.total - before[0], of_steps[[0, 3, 6]].sum(0))
    assert float(pruner._saliency.steps - before[1]) == 3


def test_a_pruner_that_is_done_reads_nothing() -> None:
    model, optimizer, pruner = build(start=1, events=1)
    train(model, optimizer, 2)
    assert pruner.step()
    assert pruner.finished
    train(model, optimizer, 2)
    assert not pruner._saliency.steps


def test_layers_that_read_no_neurons_are_not_read() -> None:
    model, _optimizer, pruner = build()
    F.cross_entropy(model(X), torch.arange(8) % 3).backward()
    pruner._saliency.record({})
    expected = pruner._saliency.scores()
    pruner._saliency = pruner._unscored(pruner._left)
    first = model.get_submodule("0")
    assert isinstance(first, nn.Linear)
    first.weight.grad = torch.full_like(first.weight, torch.nan)
    pruner._saliency.record({})
    assert pruner._saliency.scores() == expected is not None


@pytest.mark.parametrize("at", [0, 1, 3, 7, 9])
def test_a_run_that_is_resumed_within_an_epoch_reads_the_same_steps(at: int) -> None:
    def run(interrupted: bool) -> list[Tensor]:
        model, optimizer, pruner = build()
        train(model, optimizer, 5)
        pruner.step()
        train(model, optimizer, at)
        if interrupted:
            states = copy.deepcopy([part.state_dict() for part in (model, optimizer, pruner)])
            model, optimizer, pruner = build()
            for part, state in zip((pruner, model, optimizer), (states[2], states[0], states[1]), strict=True):
                part.load_state_dict(state)
        seen = []
        for _ in range(6):
            train(model, optimizer, 1)
            seen.append(pruner._saliency.steps.clone())
        return seen

    assert run(True) == run(False)


def test_undo_goes_back_to_the_readings_before_the_removal() -> None:
    model, optimizer, pruner = build(start=1, keep_removed=True)
    train(model, optimizer, 9)
    before = copy.copy(pruner._readings)
    assert pruner.step()
    assert pruner._readings == Readings(2, before=9) != before
    pruner.undo()
    assert pruner._readings == before


@pytest.mark.parametrize("kind", [TaylorPruner, APoZPruner])
def test_what_goes_by_feature_maps_misses_no_step(kind: type[NeuronPruner]) -> None:
    model, optimizer, pruner = build(kind, start=9)
    for _ in range(2):
        train(model, optimizer, 9)
        pruner.step()
    assert pruner._readings.per_epoch is None
    assert int(pruner._saliency.steps.max()) == 18 * 8  # examples


def test_the_hybrid_asks_the_pruner_that_chooses_first_to_read_every_step() -> None:
    model, optimizer, pruner = build(HybridPruner, taylor=NeuronPruner, threshold=0.1, start=9)
    assert isinstance(pruner, HybridPruner)
    train(model, optimizer, 9)
    pruner.step()
    train(model, optimizer, 8)
    assert int(pruner._taylor._saliency.steps) == 17
    assert int(pruner._saliency.steps) == 7 + 2


@pytest.mark.parametrize("kind", [NeuronPruner, TaylorPruner])
@pytest.mark.parametrize("readings", [0, -1, 1.5, True, "all"])
def test_bad_numbers_of_readings_are_refused(kind: type[NeuronPruner], readings: Any) -> None:
    with pytest.raises(ValueError, match="whole number, at least 1, or None"):
        build(kind, readings=readings)
