"""A model is followed as it is called: arguments that are not given, sizes asked for, names passed on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pruning.lifecycle import assert_masked, assert_reloads, pruned
from tests.pruning.masking import pruner_for


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)


class Optional(Body):
    """Does something else where it is given a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None, twice: bool = True) -> Tensor:
        x = self.one(x).relu()
        if mask is not None:
            x = x.cumsum(-1) * mask
        return self.three(self.two(x).relu() if twice else x)


class Asking(Body):
    """Takes sizes apart, and decides by them."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:-1]
        x = self.one(x)
        if len(shape) > 2 or x.shape[0] == 1:
            raise ValueError("not a batch")
        x = x.clamp(min=torch.finfo(x.dtype).min).relu()
        x = self.two(x).view(*shape, 4, -1).relu().reshape(*shape, -1)
        return self.three(x)


def checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return call


class PassingOn(Body):
    """Decorated, and takes names that it does not know."""

    @checked
    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, **kwargs: Any) -> Tensor:
        return self.inner(self.one(x) * scale + sum(more), **kwargs)

    def inner(self, x: Tensor, activation: str = "relu", shift: Tensor | None = None) -> Tensor:
        x = getattr(x if shift is None else x + shift, activation)()
        return self.three(self.two(x).relu())


BATCH = torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Optional, BATCH),
        (Optional, {"x": BATCH, "mask": None}),
        (Asking, BATCH),
        (PassingOn, BATCH),
        (PassingOn, (BATCH, torch.randn(5, 1, dtype=torch.float64))),
        (PassingOn, {"x": BATCH, "scale": 2.0, "activation": "tanh", "shift": torch.randn(5, 1, dtype=torch.float64)}),
    ],
)
def test_half_of_the_neurons_go_exactly(make: Callable[[], nn.Module], inputs: Any) -> None:
    found = pruned(make, inputs, inputs)
    assert_masked(found)
    assert_reloads(found)


def test_what_is_given_is_what_is_followed() -> None:
    assert "cumsum" in pruner_for(Optional().double(), (BATCH, torch.ones(5, 12).double()), target=0.1).frozen["one"]
    assert "one" not in pruner_for(Optional().double(), BATCH, target=0.1).frozen
    assert "two" in pruner_for(Optional().double(), {"x": BATCH[:, :6], "twice": True}, target=0.1).widths


class ByData(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.three(self.two(x.relu() if x.sum() > 0 else x))


class ByDevice(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.three(self.two(x.relu() if x.device.type == "cpu" else x))


@pytest.mark.parametrize("make", [ByData, ByDevice])
def test_what_only_data_or_the_device_can_tell_is_not_guessed(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"forward cannot be traced by torch\.fx.*control flow"):
        pruner_for(make().double(), BATCH)


def test_a_decision_that_a_cut_would_change_leaves_the_layer_whole() -> None:
    class ByWidth(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.three(self.two(x.relu() if x.shape[-1] == 12 else x))

    pruner = pruner_for(ByWidth().double(), BATCH, target=0.1)
    assert "depend" in pruner.frozen["one"]
    assert "two" not in pruner.frozen
