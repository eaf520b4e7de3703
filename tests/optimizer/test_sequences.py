"""Layers on sequences: what counts is the function that is computed, not how its axes are laid out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import reference
from tests.optimizer.loops import penalty, plain
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded

LENGTH = 5


class Tokens(nn.Module):
    """The same layers on the same tokens, laid out in several ways."""

    def __init__(self, layout: str = "[N, T, d]") -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        examples = len(x)
        if self.layout == "[T, N, d]":
            x = x.transpose(0, 1)
        elif self.layout == "[N T, d]":
            x = x.flatten(0, 1)
        elif self.layout == "[N, a, b, d]":
            x = torch.cat([x, x[:, :1]], 1).unflatten(1, (2, 3))
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if self.layout == "[T, N, d]":
            x = x.transpose(0, 1)
        elif self.layout == "[N T, d]":
            x = x.unflatten(0, (examples, LENGTH))
        return self.head(x.flatten(1, -2).mean(1))


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("layout", ["[N, T, d]", "[N, a, b, d]"])
def test_positions_are_summed_in_a_and_averaged_in_g(layout: str, reduction: str) -> None:
    model = seeded(lambda: Tokens(layout))
    x, y = batch(6, LENGTH, 4)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction=reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    assert_gradients_close(penalty(model, optimizer, x, y), [0.3 * g for g in gradient])
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


@pytest.mark.parametrize("eigenpairs", ["exact", "streaming"])
@pytest.mark.parametrize("layout", ["[T, N, d]", "[N T, d]"])
def test_the_layout_of_time_and_examples_does_not_matter(layout: str, eigenpairs: str) -> None:
    model = seeded(Tokens)
    other = copy.deepcopy(model)
    other.layout = layout
    x, y = batch(6, LENGTH, 4)
    options: dict[str, Any] = {"mu": 0.3, "reduction": "sum", "eigenpairs": eigenpairs, "batch_fraction": 0.5}
    here, there = plain(model, **options), plain(other, **options)
    expected, seen = penalty(model, here, x, y), penalty(other, there, x, y)
    assert there.radii() == {name: pytest.approx(value, rel=1e-9) for name, value in here.radii().items()}
    assert_gradients_close(list(seen), expected)


class PerToken(nn.Module):
    """A prediction for every token, classes last inside and on axis 1 outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))).transpose(1, 2)


def test_a_prediction_for_every_token_has_the_criterions_own_scale() -> None:
    """The mean over tokens is a mean over the tokens of an example, too."""
    model = seeded(PerToken)
    x, _ = batch(6, LENGTH, 4)
    y = torch.arange(6 * LENGTH).view(6, LENGTH) % 3

    def loss(output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, y, reduction="sum") / LENGTH

    rho, gradient = rho_and_gradient(model, loss, x)
    optimizer = plain(model, mu=0.3)
    assert_gradients_close(penalty(model, optimizer, x, y), [0.3 * g for g in gradient])
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_a_sequence_of_one_is_a_vector() -> None:
    model = seeded(Tokens)
    x, y = batch(6, 1, 4)
    flat = nn.Sequential(model.first, nn.Tanh(), model.second, nn.Tanh(), model.head)
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, x, y)
    expected = reference.radii(flat, cross_entropy_sum(y), x[:, 0])
    assert list(optimizer.radii().values()) == [pytest.approx(r.item(), rel=1e-9) for r in expected.values()]
