"""The hybrid: who chooses when, and the threshold learned from other tasks."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from baselines import HybridPruner, TaylorPruner
from baselines.hybrid import Statistics, ThresholdPredictor, area, best_threshold
from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.pruning.remaining import Remaining
from kfac_flat.pruning.saliency import Saliency
from tests.optimizer.loops import same, snapshot
from tests.reference import batch


class Squares(Saliency):
    """Another criterion with a memory: squares of Theta's effects, negated so that the most important goes first."""

    def record(self, direct: Any, scale: Tensor | None = None) -> None:
        before = self.total.clone()
        super().record(direct, scale)
        self.total = before - (self.total - before) ** 2


class OtherPruner(NeuronPruner):
    """Chooses otherwise than NeuronPruner, by what it has seen since the last removal."""

    def _unscored(self, left: Remaining) -> Saliency:
        consumers = {name: self._model.get_submodule(name) for name in self._graph.consumers}
        return Squares(consumers, {name: left.channels[name].inputs for name in consumers}, left.groups.ids)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def run(pruner: NeuronPruner, model: nn.Module, optimizer: Optimizer, epochs: range) -> None:
    for epoch in epochs:
        for step in range(3):
            x, y = batch(8, 4, seed=10 * epoch + step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruner.step()


def made(kind: Any, penalty: bool = True, **options: Any) -> tuple[nn.Module, Optimizer, Any]:
    model = network()
    optimizer: Optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    if penalty:
        optimizer = FlatKFAC(optimizer, model, mu=0.1, batch_fraction=0.5)
    schedule: dict[str, Any] = {"target": 0.8, "start": 1, "every": 1, "events": 4, "pace": "linear"}
    return model, optimizer, kind(model, optimizer, torch.zeros(1, 4).double(), **schedule, **options)


@pytest.mark.parametrize(
    ("first", "threshold", "like"),
    [
        (OtherPruner, 1.0, NeuronPruner),
        (OtherPruner, 0.0, OtherPruner),
        (TaylorPruner, 1.0, NeuronPruner),
        (TaylorPruner, 0.0, TaylorPruner),
    ],
)
def test_at_the_ends_one_of_them_chooses_all(
    first: type[NeuronPruner], threshold: float, like: type[NeuronPruner]
) -> None:
    model, optimizer, hybrid = made(HybridPruner, taylor=first, threshold=threshold)
    alone_model, alone_optimizer, alone = made(like)
    run(hybrid, model, optimizer, range(4))
    run(alone, alone_model, alone_optimizer, range(4))
    assert hybrid.survivors.keys() == alone.survivors.keys()
    assert all(torch.equal(hybrid.survivors[name], kept) for name, kept in alone.survivors.items())
    assert same(model.state_dict(), alone_model.state_dict())


def test_the_two_would_choose_differently() -> None:
    """Otherwise the tests around this one would show nothing."""
    removed = []
    for kind in (NeuronPruner, OtherPruner, TaylorPruner):
        model, optimizer, pruner = made(kind)
        run(pruner, model, optimizer, range(1))
        removed.append({name: gone.tolist() for name, gone in pruner.history[0].removed.items()})
    assert removed[0] not in removed[1:]


@pytest.mark.parametrize("first", [OtherPruner, TaylorPruner])
def test_it_switches_once_few_enough_neurons_are_left(first: type[NeuronPruner]) -> None:
    """Each event removes a fifth: with the threshold at .7, two are Taylor's and two HGNP's, on scores of one epoch."""
    model, optimizer, hybrid = made(HybridPruner, taylor=first, threshold=0.7, max_share=1.0)
    names = []
    for epoch in range(4):
        names.append(hybrid.chooses)
        # What the one whose turn it is would choose on the network as it is, having seen this epoch only.
        kind = first if epoch < 2 else NeuronPruner
        copied, stepping = copy.deepcopy((model, optimizer))
        left = round(sum(hybrid.widths[name] for name in ("0", "2")) - 4)
        share = 1 - left / sum(hybrid.widths[name] for name in ("0", "2"))
        options = {"target": share, "start": 1, "events": 1, "max_share": 1.0}
        other = kind(copied, stepping, torch.zeros(1, 4).double(), **options)
        before = hybrid.survivors
        run(hybrid, model, optimizer, range(epoch, epoch + 1))
        run(other, copied, stepping, range(epoch, epoch + 1))
        for name in ("0", "2"):
            assert torch.equal(before[name][other.survivors[name]], hybrid.survivors[name])
    assert names == [first.__name__] * 2 + ["NeuronPruner"] * 2


@pytest.mark.parametrize("first", [OtherPruner, TaylorPruner])
@pytest.mark.parametrize("at", [1, 3])
def test_resuming_is_bit_exact_before_and_after_the_switch(at: int, first: type[NeuronPruner]) -> None:
    def fresh() -> tuple[nn.Module, Optimizer, HybridPruner]:
        return made(HybridPruner, taylor=first, threshold=0.7)

    model, optimizer, pruner = fresh()
    run(pruner, model, optimizer, range(at))
    x, y = batch(8, 4, seed=99)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()  # in the middle of an epoch
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (pruner, model, optimizer)], file)
    file.seek(0)
    run(pruner, model, optimizer, range(at, 4))
    model_, optimizer_, pruner_ = fresh()
    for part, state in zip((pruner_, model_, optimizer_), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(pruner_, model_, optimizer_, range(at, 4))
    assert same(snapshot(model, optimizer), snapshot(model_, optimizer_))


@pytest.mark.parametrize("first", [OtherPruner, TaylorPruner])
def test_an_undone_removal_is_chosen_again(first: type[NeuronPruner]) -> None:
    model, optimizer, hybrid = made(HybridPruner, penalty=False, taylor=first, threshold=0.7, keep_removed=True)
    run(hybrid, model, optimizer, range(2))
    hybrid.undo()
    assert hybrid.chooses == first.__name__
    run(hybrid, model, optimizer, range(1, 4))
    assert sum(hybrid.widths[name] for name in ("0", "2")) == 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="taylor must be a subclass of NeuronPruner"):
        made(HybridPruner, taylor="taylor", threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold=1.5 must lie in \[0, 1\]"):
        made(HybridPruner, taylor=OtherPruner, threshold=1.5)
    _, _, pruner = made(HybridPruner, taylor=OtherPruner, threshold=0.5)
    with pytest.raises(ValueError, match="no state of a HybridPruner"):
        pruner.load_state_dict(made(NeuronPruner)[2].state_dict())


# -------------------------------------------------------------------------------------------------- the threshold


def lasso_by_hand(features: list[list[float]], targets: list[float], alpha: float, task: list[float]) -> float:
    """Coordinate descent on 1/(2n) |y - Xw|^2 + alpha |w|_1, features standardised."""
    n = len(features)
    columns = list(zip(*features, strict=True))
    means = [sum(c) / n for c in columns]
    deviations = [math.sqrt(sum((v - m) ** 2 for v in c) / n) or 1.0 for c, m in zip(columns, means, strict=True)]
    x = [[(v - m) / d for v, m, d in zip(row, means, deviations, strict=True)] for row in features]
    mean = sum(targets) / n
    w = [0.0] * len(means)
    for _ in range(1000):
        for k in range(len(w)):
            norm = sum(row[k] ** 2 for row in x) / n
            if norm:
                rest = [
                    t - mean - sum(w[j] * row[j] for j in range(len(w)) if j != k)
                    for row, t in zip(x, targets, strict=True)
                ]
                slope = sum(row[k] * r for row, r in zip(x, rest, strict=True)) / n
                w[k] = math.copysign(max(abs(slope) - alpha, 0.0), slope) / norm
    return mean + sum(a * (v - m) / d for a, v, m, d in zip(w, task, means, deviations, strict=True))


TASKS = [
    Statistics(102, 2040, 57_000_000, 8),
    Statistics(200, 5994, 11_200_000, 21),
    Statistics(10, 50_000, 14_700_000, 14),
    Statistics(10, 50_000, 11_200_000, 21),
    Statistics(100, 50_000, 900_000, 33),
]
THRESHOLDS = [0.91, 0.48, 0.878, 0.878, 0.6]


@pytest.mark.parametrize("alpha", [0.001, 0.03])
def test_the_prediction_is_that_of_a_lasso_written_out(alpha: float) -> None:
    predictor = ThresholdPredictor(alpha).fit(TASKS, THRESHOLDS)
    for task in (*TASKS, Statistics(50, 10_000, 10**6, 12)):
        expected = lasso_by_hand([t.features() for t in TASKS], THRESHOLDS, alpha, task.features())
        assert predictor.predict(task) == pytest.approx(min(1, max(0, expected)), abs=1e-3)


def test_a_heavy_penalty_leaves_the_mean_and_no_statistic() -> None:
    predictor = ThresholdPredictor(alpha=10.0).fit(TASKS, THRESHOLDS)
    assert predictor.weights() == {}
    assert predictor.predict(TASKS[0]) == pytest.approx(sum(THRESHOLDS) / 5)


def test_a_prediction_is_a_share() -> None:
    tasks = [Statistics(10**k, 1000, 1000, 3) for k in (1, 2)]
    predictor = ThresholdPredictor(alpha=1e-6).fit(tasks, [0.1, 0.9])
    assert predictor.predict(Statistics(10**6, 1000, 1000, 3)) == 1.0
    assert predictor.predict(Statistics(1, 1000, 1000, 3)) == 0.0


def test_too_little_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="1 tasks with 1 thresholds"):
        ThresholdPredictor().fit(TASKS[:1], [0.5])
    with pytest.raises(ValueError, match="5 tasks with 4 thresholds"):
        ThresholdPredictor().fit(TASKS, THRESHOLDS[:4])
    for use in (lambda p: p.predict(TASKS[0]), lambda p: p.weights()):
        with pytest.raises(RuntimeError, match="call fit"):
            use(ThresholdPredictor())


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.floats(0, 1), st.floats(0, 1)),
        min_size=2,
        max_size=8,
        unique_by=lambda r: r[0],
    )
)
def test_no_threshold_is_better_than_the_best(runs: list[tuple[int, float, float]]) -> None:
    left = [share / 100 for share, _, _ in runs]
    taylor, hgnp = [t for _, t, _ in runs], [h for _, _, h in runs]
    ascending = sorted(zip(left, taylor, hgnp, strict=True))

    def score(threshold: float) -> float:
        points = [(s, t if s > threshold else h) for s, t, h in ascending]
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))

    best = best_threshold(left, taylor, hgnp)
    assert all(score(k / 200) <= score(best) + 1e-12 for k in range(201))
    assert area([s for s, _, _ in ascending], [h for _, _, h in ascending]) == pytest.approx(score(1.0))
