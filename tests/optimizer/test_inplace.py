"""Operations that work in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    gradients,
    penalty,
    plain,
    step,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_a_model_that_works_in_place_on_its_input_changes_it_once() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(1.0)
            return self.fc(x)

    model, x = InPlace(), torch.zeros(6, 4)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1, batch_fraction=1.0, eigenpairs="exact")
    step(model, optimizer, x)
    assert torch.equal(x, torch.full_like(x, -1.0))
    g = optimizer.radii()["fc"] / 4  # A has the one eigenvalue |a|^2 = 4, with every input at -1
    assert 0 < g < 1


class Operations(nn.Module):
    """Every way to work in place on what a layer has returned, or none of them."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.activations = nn.ModuleList(kind(inplace=inplace) for kind in (nn.ReLU, nn.SiLU))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.activations[0](self.norm(self.conv(x)))
        y = self.activations[1](self.second(x))
        if self.inplace:
            y += x
            y.mul_(0.5)
        else:
            y = 0.5 * (y + x)
        y = F.leaky_relu(y, 0.2, inplace=self.inplace)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_operations_in_place_have_the_penalty_of_others(reduction: str) -> None:
    model, other = seeded(lambda: Operations(True)), seeded(lambda: Operations(False))
    x, y = batch(6, 2, 5, 5)
    rho, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, reduction=reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert all(activation.inplace for activation in model.activations)


def test_an_output_that_the_loop_changes_in_place_is_counted_as_the_model_returned_it() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3, fisher="sampled", likelihood=lambda o, _: F.cross_entropy(o, y, reduction="none"))
    output = model(x)
    output *= 2
    F.cross_entropy(output, y).backward()
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))
