"""Subclasses of Linear and Conv2d are read where they compute what their parents do, and named elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    penalty,
    plain,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded


class Quiet(nn.Linear):
    """Keeps the forward."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, dtype=torch.float64)
        self.note = "own attributes do not matter"


class QuietConv(nn.Conv2d):
    """Keeps the forward."""


class Scaled(nn.Linear):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Adapted(nn.Module):
    """A low-rank update of a frozen layer, as adapters make it."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.down, self.up = nn.Linear(6, 5), nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def test_subclasses_that_keep_the_forward_are_read() -> None:
    model = nn.Sequential(QuietConv(2, 4, 3), nn.Tanh(), nn.Flatten(), Quiet(36, 3)).double()
    x, y = batch(6, 2, 5, 5)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    optimizer = plain(model, mu=0.3, reduction="sum")
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert optimizer.skipped_layers == {}


def test_subclasses_with_a_forward_of_their_own_are_named_and_the_rest_is_right() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Scaled(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum", names=["0", "4"])
    optimizer = plain(model, mu=0.3, reduction="sum")
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert optimizer.skipped_layers == {"2": "Scaled has no rule: only Linear and Conv2d are read"}


def test_adapters_around_a_frozen_layer_are_layers() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Adapted(), nn.Tanh(), nn.Linear(5, 3)))
    x, y = batch(8, 4)
    names = ["0", "2.down", "2.up", "4"]
    other = copy.deepcopy(model).requires_grad_(True)
    _, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, reduction="sum", names=names)
    optimizer = plain(model, mu=0.3, reduction="sum")
    kept = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.requires_grad]
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, kept))
    assert set(optimizer.radii()) == set(names)


def test_layers_without_a_rule_are_named_with_the_reason() -> None:
    layers = {
        "one": nn.Conv1d(2, 3, 1),
        "two": nn.Bilinear(4, 4, 2),
        "three": nn.Embedding(5, 4),
        "four": nn.LSTM(4, 4),
    }
    model = nn.ModuleDict({**layers, "five": nn.Linear(4, 3), "six": nn.LayerNorm(4)})
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    assert optimizer.skipped_layers == {
        name: f"{type(module).__name__} has no rule: only Linear and Conv2d are read" for name, module in layers.items()
    }


def test_lazy_layers_are_read_once_they_know_their_size() -> None:
    model = nn.Sequential(nn.LazyLinear(6, dtype=torch.float64), nn.Tanh(), nn.LazyLinear(3, dtype=torch.float64))
    x, y = batch(8, 4)
    model(x)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    assert_gradients_close(penalty(model, plain(model, mu=0.3), x, y), times(0.3, gradient))
