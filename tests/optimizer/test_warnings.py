"""Every warning of a step points at the line of the training loop that took it, however it was called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from kfac_flat import FlatKFAC
from kfac_flat.curvature import tracker
from tests.optimizer.test_failures import out_of_memory
from tests.reference import batch, mlp


class OfEight(nn.Module):
    """Runs on batches of eight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.reshape(8, 4))
        return out


def doubled() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def called(optimizer: FlatKFAC, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.step()


def called_by_a_closure(optimizer: FlatKFAC, closure: Callable[[], Tensor]) -> None:
    optimizer.step(closure)


def called_with_a_scheduler(optimizer: FlatKFAC, closure: Callable[[], Tensor]) -> None:
    StepLR(optimizer, 1)
    called(optimizer, closure)


def called_by_a_scaler(optimizer: FlatKFAC, closure: Callable[[], Tensor]) -> None:
    closure()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


@pytest.mark.parametrize("call", [called, called_by_a_closure, called_with_a_scheduler, called_by_a_scaler])
@pytest.mark.parametrize(
    ("make", "factor", "message"),
    [
        (mlp, float("nan"), "left the penalty out of a step"),
        (doubled, 1.0, "gives another output than the model did"),
        (OfEight, 1.0, "does not run on a part of its batch"),
        (mlp, 1.0, "out of memory for the curvature"),
    ],
    ids=["not finite", "another output", "whole batches", "memory"],
)
def test_a_warning_points_at_the_line_that_took_the_step(
    make: Callable[[], nn.Module], factor: float, message: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = make(), batch(8, 4)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model)
    if "memory" in message:
        monkeypatch.setattr(tracker, "factors_times", out_of_memory)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(factor * x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match=message) as caught:
        call(optimizer, closure)
    assert {warning.filename for warning in caught} == {__file__}
