"""Whatever a model is called with: keywords, nested and several inputs, packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, plain
from tests.reference import batch, cross_entropy_sum, mlp, rho_and_gradient


class Named(nn.Module):
    """Takes keyword arguments, nested ones too, and a tensor that has no axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, inputs: dict[str, list[Tensor]], scale: Tensor) -> Tensor:
        return self.net(scale * inputs["x"][0])


def test_keyword_arguments_and_nested_inputs_are_repeated_and_cut() -> None:
    model, (x, y) = Named(), batch(8, 4)
    optimizer = plain(model, mu=0.3, batch_fraction=0.5)
    criterion_of(optimizer)(model(scale=torch.tensor(2.0), inputs={"x": [x]}), y).backward()
    optimizer.step()
    rho, _ = rho_and_gradient(model.net, cross_entropy_sum(y[:4]), 2 * x[:4])
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


class Mixing(nn.Module):
    """Needs the whole batch: the adjacency has an axis of examples on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(torch.tanh(adjacency @ self.a(x)))


def test_a_model_that_needs_its_whole_batch_gets_it_with_a_warning() -> None:
    model = Mixing()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4), torch.rand(6, 6)), torch.arange(6) % 3).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="does not run on a part of its batch.*batch_fraction=1"):
        run()
    run()  # and says it once
    assert optimizer.rho > 0
