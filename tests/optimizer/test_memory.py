"""What a refresh holds at once, counted storage by storage: ratios that no other work on the machine can change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.memory import Allocated
from kfac_flat import FlatKFAC


def steps_of(model: nn.Module, x: Tensor, steps: int, **options: Any) -> list[int]:
    """Peak bytes of each step alone, of which all are refreshes that survey all layers."""
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, every=1, survey_every=1, **options)
    peaks = []
    with Allocated() as memory:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
            peaks.append(memory.during(optimizer.step))
    return peaks


def test_the_counter_sees_what_is_held_at_once_and_nothing_that_is_gone() -> None:
    with Allocated() as memory:
        kept: list[Tensor] = []
        one_after_the_other = memory.during(lambda: [torch.zeros(1000).sum() for _ in range(3)])
        at_once = memory.during(lambda: kept.extend(torch.zeros(1000) for _ in range(3)))
    assert 4000 <= one_after_the_other < 8000
    assert 12000 <= at_once < 13000


def test_a_refresh_holds_no_second_copy_of_the_new_gradient() -> None:
    """Many equal layers, few examples: weights are nearly all there is, and a layer is little of it."""
    layers = [module for _ in range(8) for module in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert steps_of(model, torch.randn(4, 128), 3)[-1] < 1.5 * weights


@pytest.mark.parametrize("first", [True, False])
def test_the_memory_of_activations_follows_batch_fraction(first: bool) -> None:
    """At the first step as well, where the twin's output is compared with the model's on the whole batch."""
    convolutions = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(
        *(m for ms in convolutions for m in ms), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    x = torch.randn(64, 8, 16, 16)
    at = 0 if first else -1
    whole, quarter = (steps_of(model, x, 2, batch_fraction=fraction)[at] for fraction in (1.0, 0.25))
    assert quarter < 0.3 * whole
