"""Layers that are called more than once in a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    criterion_of,
    gradients,
    penalty,
    plain,
    step,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.mode = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), "once"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        for _ in range({"off": 0, "once": 1, "twice": 2}[self.mode]):
            x = 9 * self.b(x)
        return self.c(x)


def test_a_layer_that_is_read_no_more_is_no_part_of_rho() -> None:
    model = Switching()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, every=1, survey_every=1)
    step(model, optimizer)
    model.mode = "off"
    step(model, optimizer)
    step(model, optimizer)
    assert set(optimizer.radii()) == {"a", "c"}
    assert optimizer.rho == pytest.approx(max(optimizer.radii().values()))
    model.mode = "twice"
    step(model, optimizer)
    assert "more than once" in optimizer.skipped_layers["b"]
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)


class Repeating(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(self.times):
            x = torch.tanh(self.middle(x))
        return self.head(x)


@pytest.mark.parametrize("calls", [2, 5])
@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_a_layer_called_again_has_no_single_block_and_is_named_and_the_rest_is_right(
    reduction: str, calls: int
) -> None:
    model, (x, y) = seeded(lambda: Repeating(calls)), batch(8, 4)
    names = ["first", "head"]
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction=reduction, names=names)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert optimizer.skipped_layers == {"middle": "called more than once in one forward pass"}
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_the_whole_model_called_twice_for_one_loss_is_one_batch() -> None:
    """As in contrastive learning: each call is a part of the batch."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    criterion = criterion_of(optimizer)
    (criterion(model(x[:5]), y[:5]) + criterion(model(x[5:]), y[5:])).backward()
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


class Force(nn.Module):
    """Features are the derivative of an energy, as in models of molecules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.energy, self.head = nn.Linear(4, 6), nn.Linear(6, 1, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(torch.tanh(self.first(x))).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(force)


def test_layers_that_the_model_itself_differentiates_are_named_and_the_others_read() -> None:
    model = Force()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, every=1, survey_every=1)
    step(model, optimizer)
    step(model, optimizer)
    assert set(optimizer.radii()) == {"head"}
    assert set(optimizer.skipped_layers) == {"first", "energy"}
    assert all("within the forward pass" in reason for reason in optimizer.skipped_layers.values())


def test_what_is_in_front_of_a_derivative_gets_the_penalty_of_what_is_behind() -> None:
    model, (x, y) = seeded(Force).double(), batch(8, 4)
    optimizer = plain(model, mu=0.3, layers=["head"])
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, names=["head"])
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
