"""Dropout: the curvature is that of the pass which the user made, masks included."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    penalty,
    plain,
    step,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded

KINDS: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "Dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "RReLU": lambda: nn.RReLU(),
}


class Frozen(nn.Module):
    """Does again to its input what a random module did once: out = factor * x + shift."""

    def __init__(self, x: Tensor, out: Tensor, other: Tensor, other_out: Tensor) -> None:
        super().__init__()
        self.factor = (out - other_out) / (x - other)
        self.shift = out - self.factor * x

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift


def replayed(module: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """The affine map that the module is for these very random numbers."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        out = module(x.clone())
        torch.manual_seed(seed)
        other = module(1.01 * x)  # of the same signs
    return Frozen(x, out, 1.01 * x, other)


@pytest.mark.parametrize("kind", KINDS)
def test_rho_and_its_gradient_are_those_of_the_masks_that_were_drawn(kind: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), KINDS[kind](), nn.Linear(8, 3)))
    x, y = batch(8, 4)
    other = copy.deepcopy(model)
    other[1] = replayed(model[1], model[0](x).detach(), seed=4)
    rho, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, reduction="sum")
    optimizer = plain(model, mu=0.3, reduction="sum")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        seen = penalty(model, optimizer, x, y)
    assert_gradients_close(seen, times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_the_users_random_numbers_are_those_of_training_without_a_penalty() -> None:
    states = []
    for mu in (0.0, 0.3):
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=mu, every=2)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            for _ in range(4):
                step(model, optimizer, batch(12, 4)[0])
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_dropout_switched_off_is_off() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    model[1].eval()
    x, y = batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    assert_gradients_close(penalty(model, plain(model, mu=0.3), x, y), times(0.3, gradient))
