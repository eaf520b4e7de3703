"""Every learning rate scheduler of torch drives the wrapper as it drives the base."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR

from kfac_flat import FlatKFAC
from tests.optimizer.loops import norm, penalty, plain, same, train
from tests.reference import batch, cross_entropy_sum, mlp, rho_and_gradient

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_kind_of_scheduler_in_torch_is_tried() -> None:
    kinds = {kind for kind in vars(lr_scheduler).values() if inspect.isclass(kind)}
    names = {kind.__name__ for kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)}
    assert names - {"LRScheduler", "_LRScheduler"} <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_resumes_from_its_state(name: str) -> None:
    def pair() -> tuple[FlatKFAC, Any]:
        model = mlp()
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9), model, mu=0.1)
        return optimizer, SCHEDULERS[name](optimizer)

    def run(optimizer: FlatKFAC, scheduler: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            train(optimizer.model, optimizer, 1, start=step)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = pair()
    run(optimizer, scheduler, range(3))
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = run(optimizer, scheduler, range(3, 6))
    other, resumed = pair()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert run(other, resumed, range(3, 6)) == expected


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_on_the_wrapper_set_the_learning_rates_they_set_on_the_base(name: str) -> None:
    def rates(wrap: bool) -> list[tuple[float, ...]]:
        model = mlp()
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer: Optimizer = FlatKFAC(base, model, mu=0.1) if wrap else base
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(6):
            train(model, optimizer, 1, start=step)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        return seen

    assert rates(True) == rates(False)
    assert len(set(rates(True))) > 1


def test_a_scheduler_does_not_keep_the_penalty_from_being_added() -> None:
    """Schedulers replace ``step`` on the instance."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.5)
    lr_scheduler.StepLR(optimizer, 1)
    added = norm(penalty(model, optimizer, x, y))
    assert added > 0
    assert added == pytest.approx(0.5 * float(norm(gradient)), rel=1e-6)


def test_a_learning_rate_set_on_the_wrapper_is_the_one_used() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 2)
    assert same(model.state_dict(), mlp().state_dict())
