"""Weight pruning: the least weights of the whole network become zero and stay so, whatever the optimizer does."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from baselines import MagnitudeWeightPruner
from kfac_flat import FlatKFAC
from tests.optimizer.loops import same, snapshot
from tests.reference import Residual, batch, mlp, seeded

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "flat": lambda m: FlatKFAC(SGD(m.parameters(), lr=0.1, momentum=0.9), m, mu=0.1),
}


def train(model: nn.Module, optimizer: Optimizer, steps: range, shape: tuple[int, ...] = (8, 4)) -> None:
    for step in steps:
        x, y = batch(*shape, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def pruner_of(model: nn.Module, optimizer: Optimizer | None = None, **options: Any) -> MagnitudeWeightPruner:
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    return MagnitudeWeightPruner(model, optimizer, **{"target": 0.5, "start": 1, "every": 1, "events": 1, **options})


def weights(model: nn.Module) -> list[float]:
    return [v for p in model.parameters() if p.dim() > 1 for v in p.flatten().tolist()]


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), target=st.floats(0.01, 0.99))
def test_the_smallest_of_all_layers_go_and_no_other_number_changes(seed: int, target: float) -> None:
    model = mlp(seed)
    before, biases = weights(model), [p.clone() for p in model.parameters() if p.dim() == 1]
    count = round(target * len(before))
    report = pruner_of(model, target=target).step()
    gone = set(sorted(range(len(before)), key=lambda i: abs(before[i]))[:count])
    assert weights(model) == [0.0 if i in gone else v for i, v in enumerate(before)]
    assert all(torch.equal(a, b) for a, b in zip(biases, (p for p in model.parameters() if p.dim() == 1), strict=True))
    assert sum(report.removed.values()) == count
    assert report.sparsity == pytest.approx(count / len(before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_has_gone_stays_zero_while_the_rest_is_trained(name: str) -> None:
    """As if the gradient were masked, where the optimizer has no memory that reaches across weights."""
    model = seeded(Residual)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, range(3), (6, 2, 5, 5))
    pruner = pruner_of(model, optimizer, target=0.8)
    pruner.step()
    zeros = [p == 0 for p in model.parameters()]
    for step in range(3, 6):
        before = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, range(step, step + 1), (6, 2, 5, 5))
        for p, q, zero in zip(model.parameters(), before, zeros, strict=True):
            assert not p[zero].any()
            assert p.dim() == 1 or not torch.equal(p[~zero], q[~zero])
    assert pruner.sparsity == pytest.approx(0.8, abs=0.01)
    assert pruner.sparsities() == {
        name: pytest.approx(float((p == 0).double().mean())) for name, p in model.named_parameters() if p.dim() > 1
    }


def test_a_dense_network_masked_by_hand_trains_alike() -> None:
    model, other = mlp(), mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = pruner_of(model, optimizer)
    pruner.step()
    masks = [(p != 0).double() for p in model.parameters()]
    bare = SGD(other.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(4))
    for step in range(4):
        masked = copy.deepcopy(other)
        with torch.no_grad():
            for p, mask in zip(masked.parameters(), masks, strict=True):
                p *= mask
        x, y = batch(8, 4, seed=step)
        masked.zero_grad()
        F.cross_entropy(masked(x), y).backward()
        for p, q, mask in zip(other.parameters(), masked.parameters(), masks, strict=True):
            p.grad = q.grad * mask
        bare.step()
    for p, q, mask in zip(model.parameters(), other.parameters(), masks, strict=True):
        assert torch.allclose(p, q * mask, rtol=1e-12)


def test_removals_follow_the_schedule_and_never_come_back() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = pruner_of(model, optimizer, target=0.8, start=2, every=2, events=2, pace="linear")
    sparsities, gone = [], torch.zeros(len(weights(model)), dtype=torch.bool)
    for epoch in range(5):
        train(model, optimizer, range(epoch, epoch + 1))
        report = pruner.step()
        sparsities.append(report.sparsity)
        assert bool(report) == (epoch in (1, 3))
        assert bool(report.reason) != bool(report)
        now = torch.tensor(weights(model)) == 0
        assert (now | ~gone).all()
        gone = now
    assert sparsities == pytest.approx([0.0, 0.4, 0.4, 0.8, 0.8], abs=0.01)
    assert pruner.finished


def test_ignored_layers_stay_dense() -> None:
    model = mlp()
    pruner = pruner_of(model, target=0.9, ignore=["0"])
    pruner.step()
    assert model[0].weight.all()
    assert set(pruner.sparsities()) == {"2.weight", "4.weight"}


def test_resuming_is_bit_exact() -> None:
    def fresh() -> tuple[nn.Module, Optimizer, MagnitudeWeightPruner]:
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, pruner_of(model, optimizer, target=0.8, events=3)

    def go_on(run: tuple[nn.Module, Optimizer, MagnitudeWeightPruner], epochs: range) -> None:
        for epoch in epochs:
            train(run[0], run[1], range(epoch, epoch + 1))
            run[2].step()

    run = fresh()
    go_on(run, range(2))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in run], file)
    file.seek(0)
    go_on(run, range(2, 5))
    resumed = fresh()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go_on(resumed, range(2, 5))
    assert same(snapshot(*resumed[:2]), snapshot(*run[:2]))
    assert same(resumed[2].state_dict(), run[2].state_dict())
    with pytest.raises(ValueError, match="belongs to another model"):
        pruner_of(nn.Linear(3, 3)).load_state_dict(run[2].state_dict())


def test_a_copy_goes_on_alike() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    run = (model, optimizer, pruner_of(model, optimizer))
    run[2].step()
    other = copy.deepcopy(run)
    train(*run[:2], range(2))
    train(*other[:2], range(2))
    assert same(model.state_dict(), other[0].state_dict())
    assert (torch.tensor(weights(other[0])) == 0).sum() == (torch.tensor(weights(model)) == 0).sum() > 30


def test_hooks_are_gone_with_the_pruner() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner_of(model, optimizer).step()
    train(model, optimizer, range(1))
    assert weights(model).count(0) < 10  # those of neurons that nothing reads have no gradient


def test_bad_input_is_refused() -> None:
    model = mlp()
    for target in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"target=.* must lie strictly between 0 and 1"):
            pruner_of(model, target=target)
    with pytest.raises(ValueError, match="no weights to remove"):
        pruner_of(model, ignore=["*"])
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        pruner_of(model, SGD(mlp().parameters(), lr=0.1))
