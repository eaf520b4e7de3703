"""Layers that are called more than once in a forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import step


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
