"""Clearing gradients in all of its forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    penalty,
    plain,
    same,
    snapshot,
    times,
    train,
)
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_zero_grad_in_its_forms() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    for clear in (
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(set_to_none=True),
        lambda: optimizer.zero_grad(True),
    ):
        F.cross_entropy(model(x), y).backward()
        clear()
        assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_step_in_between_without_backward_is_the_bases() -> None:
    """After zero_grad the base optimizer has nothing to do, and neither has the penalty."""
    model = seeded(Residual)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.3, every=1)
    model.train()
    train(model, optimizer, 1, shape=(8, 2, 5, 5))
    optimizer.zero_grad()
    model(batch(8, 2, 5, 5)[0])
    before = snapshot(model, optimizer.base)
    optimizer.step()
    assert same(snapshot(model, optimizer.base), before)


def test_a_refresh_without_gradients_is_made_up_for_at_the_next_step() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, every=2, reduction="sum")
    for _ in range(2):
        penalty(model, optimizer, 2 * x, y)
    optimizer.zero_grad()
    model(x)
    optimizer.step()
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))


@pytest.mark.parametrize(
    "clear",
    [
        lambda model, optimizer: optimizer.zero_grad(),
        lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda model, optimizer: optimizer.base.zero_grad(),
        lambda model, optimizer: model.zero_grad(),
        lambda model, optimizer: model.zero_grad(set_to_none=False),
        lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
    ],
    ids=["optimizer", "optimizer to zero", "base", "model", "model to zero", "by hand"],
)
def test_however_gradients_are_cleared_the_trajectory_is_the_same(clear: Callable[..., Any]) -> None:
    def run(clear: Callable[..., Any]) -> Any:
        model = mlp()
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9), model, mu=0.3, every=2)
        for number in range(5):
            x, y = batch(8, 4, seed=number)
            clear(model, optimizer)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return snapshot(model, optimizer)

    assert same(run(clear), run(lambda model, optimizer: optimizer.zero_grad()))
