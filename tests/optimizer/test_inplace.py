"""Operations that work in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import step


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
