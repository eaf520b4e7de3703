"""Accelerate wraps and prepares what it is given; the loop goes on as without it, and from its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.integrations.accelerate import checkpoint_pruner
from tests.pruning.by_hand import assert_same_tensors

EPOCHS, EXAMPLES, BATCH = 5, 48, 8


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps precision and accumulation for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def data() -> TensorDataset:
    x = torch.randn(EXAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.flatten(1)[:, :3].argmax(1))


class Run:
    """All that is trained, prepared if there is an accelerator."""

    def __init__(self, accelerator: Accelerator | None, adam: bool = False) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)),
        )
        inner = AdamW(self.network.parameters()) if adam else SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        self.flat = FlatKFAC(inner, self.network, mu=0.05, every=4)
        self.pruner = NeuronPruner(
            self.network, self.flat, data()[:1][0], target=0.5, start=2, every=1, events=2, pace="linear"
        )
        schedule = CosineAnnealingLR(self.flat, EPOCHS * EXAMPLES // BATCH)
        self.model, self.optimizer, self.schedule, self.loader = (
            self.network, self.flat, schedule, DataLoader(data(), BATCH),
        )  # fmt: skip
        if accelerator is not None:
            checkpoint_pruner(accelerator, self.pruner)
            prepared: Any = accelerator.prepare(self.model, self.optimizer, schedule, self.loader)
            self.model, self.optimizer, self.schedule, self.loader = prepared


def epoch(run: Run, accelerator: Accelerator) -> None:
    for x, y in run.loader:
        with accelerator.accumulate(run.model):
            loss = nn.functional.cross_entropy(run.model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.network.parameters(), 1.0)
            run.optimizer.step()
            run.schedule.step()
            run.optimizer.zero_grad()
    run.pruner.step()


def by_hand(accumulate: int, bf16: bool, adam: bool) -> nn.Module:
    run = Run(None, adam)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(run.loader, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = run.model(x)
            (nn.functional.cross_entropy(out.float(), y) / accumulate).backward()
            if i % accumulate == 0:
                nn.utils.clip_grad_norm_(run.network.parameters(), 1.0)
                run.optimizer.step()
                run.schedule.step()
                run.optimizer.zero_grad()
        run.pruner.step()
    assert run.pruner.sparsity == 0.5
    return run.network


@pytest.mark.parametrize(
    ("accumulate", "bf16", "adam"), [(1, False, False), (2, False, False), (1, True, False), (2, True, True)]
)
def test_a_prepared_loop_is_the_plain_loop_bit_for_bit(accumulate: int, bf16: bool, adam: bool) -> None:
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if bf16 else "no",
        gradient_accumulation_steps=accumulate,
        step_scheduler_with_optimizer=True,
    )
    run = Run(accelerator, adam)
    for _ in range(EPOCHS):
        epoch(run, accelerator)
    assert_same_tensors(run.network, by_hand(accumulate, bf16, adam))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_training_goes_on_from_a_saved_state_to_the_same_network(stop: int, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    whole = Run(accelerator)
    for i in range(EPOCHS):
        epoch(whole, accelerator)
        if i + 1 == stop:
            accelerator.save_state(str(tmp_path))
    again_with = Accelerator(cpu=True)
    again = Run(again_with)
    again_with.load_state(str(tmp_path))
    for _ in range(stop, EPOCHS):
        epoch(again, again_with)
    assert_same_tensors(again.network, whole.network)
    assert again.pruner.epoch == EPOCHS


def test_what_accelerate_puts_around_an_optimizer_is_refused_with_advice() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = Accelerator(cpu=True).prepare(SGD(network.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="give FlatKFAC the optimizer inside of the AcceleratedOptimizer"):
        FlatKFAC(prepared, network)
    with pytest.raises(TypeError, match="give NeuronPruner the optimizer inside of the AcceleratedOptimizer"):
        NeuronPruner(network, prepared, torch.randn(1, 4), target=0.5)
