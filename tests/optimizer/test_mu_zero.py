import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from kfac_flat import FlatKFAC
from kfac_flat.curvature.tracker import RadiusTracker
from kfac_flat.curvature.twin import Twin
from tests.optimizer.loops import MakeBase, same, snapshot, train
from tests.reference import Residual, batch, mlp, seeded

BASES: dict[str, MakeBase] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "rmsprop": lambda m: RMSprop(m.parameters(), lr=0.01, momentum=0.5),
}
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (mlp, (8, 4)),
    "residual": (lambda: seeded(lambda: Residual(inplace=True)), (8, 2, 5, 5)),
    "dropout": (lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))), (8, 4)),
}


def trajectories(base: MakeBase, network: str, steps: int, **options: Any) -> tuple[Any, Any]:
    """Final states of the bare base optimizer and of FlatKFAC around its like."""
    make, shape = NETWORKS[network]
    ends = []
    for wrap in (False, True):
        model = make().float()
        bare: Optimizer = base(model)
        optimizer = FlatKFAC(bare, model, **options) if wrap else bare
        train(model, optimizer, steps, shape=shape)
        ends.append(snapshot(model, bare))
    return ends[0], ends[1]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("base", BASES)
def test_without_a_penalty_the_trajectory_is_the_base_optimizers_bit_for_bit(base: str, network: str) -> None:
    bare, wrapped = trajectories(BASES[base], network, steps=6, mu=0.0)
    assert same(bare, wrapped)


@pytest.mark.parametrize("base", BASES)
def test_with_a_penalty_it_is_not(base: str) -> None:
    bare, wrapped = trajectories(BASES[base], "mlp", steps=6, mu=0.1)
    assert not same(bare[0], wrapped[0])


def test_a_schedule_at_zero_is_bit_for_bit_too_until_it_rises() -> None:
    bare, wrapped = trajectories(BASES["adam"], "mlp", steps=3, mu=lambda step: 0.0 if step < 3 else 0.1)
    assert same(bare, wrapped)
    bare, wrapped = trajectories(BASES["adam"], "mlp", steps=4, mu=lambda step: 0.0 if step < 3 else 0.1)
    assert not same(bare[0], wrapped[0])


def test_no_twin_is_built_and_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Twin, "__init__", lambda *_: calls.append("twin"))
    monkeypatch.setattr(RadiusTracker, "gradient", lambda *_: calls.append("gradient"))
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.0, every=1)
    train(model, optimizer, 3)
    assert calls == []
    assert optimizer.rho != optimizer.rho  # NaN
    assert optimizer.radii() == {}


def test_the_batch_is_not_kept() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.0)
    x, y = batch(8, 4)
    gone = weakref.ref(x)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    del x
    gc.collect()
    assert gone() is None


def test_step_needs_no_forward_of_the_model() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    SGD(twin.parameters(), lr=0.1).step()
    assert same(model.state_dict(), twin.state_dict())
