"""Memory formats: channels_last in, channels_last out, and the same penalty."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    penalty,
    plain,
    times,
)
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded


def pair() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = seeded(Residual)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return model, other, *batch(6, 2, 5, 5)


@pytest.mark.parametrize("eigenpairs", ["streaming", "exact"])
def test_the_penalty_is_that_of_the_usual_format(eigenpairs: str) -> None:
    model, other, x, y = pair()
    expected = penalty(model, plain(model, mu=0.3, reduction="sum", eigenpairs=eigenpairs), x, y)
    optimizer = plain(other, mu=0.3, reduction="sum", eigenpairs=eigenpairs)
    seen = penalty(other, optimizer, x.to(memory_format=torch.channels_last), y)
    assert_gradients_close(list(seen), expected)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    if eigenpairs == "exact":
        assert_gradients_close(list(seen), times(0.3, gradient))


def test_parameters_gradients_and_state_keep_their_format() -> None:
    _, other, x, y = pair()
    optimizer = FlatKFAC(SGD(other.parameters(), lr=0.1, momentum=0.9), other, mu=0.3, every=2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(other(x.to(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
    for layer in (other.stem, other.conv):
        for t in (layer.weight, layer.weight.grad, optimizer.state[layer.weight]["momentum_buffer"]):
            assert t.is_contiguous(memory_format=torch.channels_last)
