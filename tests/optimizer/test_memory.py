"""What a refresh holds at once, counted storage by storage: ratios that no other work on the machine can change."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_flat import FlatKFAC


class Allocated(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def of(self, call: Any) -> int:
        """Peak during a call, over what was there before it."""
        before = self.peak = self.now
        call()
        return self.peak - before


def steps_of(model: nn.Module, x: Tensor, steps: int, **options: Any) -> list[int]:
    """Peak bytes of each step alone, of which all are refreshes that survey all layers."""
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, every=1, survey_every=1, **options)
    peaks = []
    with Allocated() as memory:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
            peaks.append(memory.of(optimizer.step))
    return peaks


def test_the_counter_sees_what_is_held_at_once_and_nothing_that_is_gone() -> None:
    with Allocated() as memory:
        kept: list[Tensor] = []
        one_after_the_other = memory.of(lambda: [torch.zeros(1000).sum() for _ in range(3)])
        at_once = memory.of(lambda: kept.extend(torch.zeros(1000) for _ in range(3)))
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
