"""Activation checkpointing: intermediate results computed twice are counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.optimizer.loops import penalty, plain, times
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


class Checkpointed(nn.Module):
    """Three blocks; what lies in the first two is forgotten and computed again."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def without_checkpoints(model: Checkpointed) -> Checkpointed:
    other = Checkpointed(None).double()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_penalty_is_that_of_the_model_without_checkpoints(reentrant: bool, reduction: str) -> None:
    model = seeded(lambda: Checkpointed(reentrant))
    x, y = batch(8, 4)
    rho, gradient = rho_and_gradient(without_checkpoints(model), cross_entropy_sum(y), x, reduction=reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    seen = penalty(model, optimizer, x, y)
    assert_gradients_close(seen, times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert optimizer.skipped_layers == {}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_sequential(reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Any:
            return checkpoint_sequential(self.net, 2, x, use_reentrant=reentrant)

    model = seeded(Model)
    x, y = batch(8, 4)
    _, gradient = rho_and_gradient(model.net, cross_entropy_sum(y), x, reduction="sum")
    optimizer = plain(model, mu=0.3, reduction="sum")
    seen = penalty(model, optimizer, x.requires_grad_(), y)
    assert_gradients_close(seen, times(0.3, gradient))


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_inside_a_checkpoint_falls_on_the_same_units(reentrant: bool) -> None:
    ends = []
    for how in (None, reentrant):
        model = seeded(lambda how=how: Checkpointed(how, dropout=0.5))
        optimizer = plain(model, mu=0.3, reduction="sum")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            ends.append(penalty(model, optimizer, *batch(8, 4)))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*ends, strict=True))
