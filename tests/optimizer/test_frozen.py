"""Layers that are frozen, wholly or in part."""

from __future__ import annotations

import torch
from torch.optim import SGD

from tests.optimizer.loops import penalty, plain
from tests.reference import batch, mlp


def test_parameters_without_a_gradient_stay_without() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    model[4].requires_grad_(False)
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.1), mu=0.3)
    before = model[4].weight.clone()
    penalty(model, optimizer, x, y)
    assert model[4].weight.grad is None
    assert torch.equal(model[4].weight, before)
