"""A training that can be killed at any time: with ``--resume`` it goes on from its last checkpoint.

``test_resume.py`` runs it as ``python -m tests.pruning.resumable FOLDER``.
"""

from __future__ import annotations

import argparse
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from kfac_flat import FlatKFAC, NeuronPruner
from tests.pruning.by_hand import batch, network

EPOCHS, STEPS_AN_EPOCH, EXAMPLES = 6, 7, 42
FIRST_CUT, EVENTS = 2, 3  # neurons go at the end of epochs 2, 3 and 4
STEPS, SAVE_EVERY = EPOCHS * STEPS_AN_EPOCH, 3


@dataclass
class Run:
    """All that a checkpoint holds."""

    model: nn.Module
    optimizer: FlatKFAC
    scheduler: optim.lr_scheduler.LRScheduler
    pruner: NeuronPruner
    step: int = 0

    @classmethod
    def new(cls, seed: int) -> Run:
        torch.manual_seed(seed)
        layers = list(network())
        model = nn.Sequential(*layers[:-1], nn.Dropout(0.3), layers[-1])  # draws from torch's global generator
        optimizer = FlatKFAC(optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, mu=0.05, every=4)
        x, _ = batch()
        pruner = NeuronPruner(model, optimizer, x, target=0.5, start=FIRST_CUT, every=1, events=EVENTS, pace="linear")
        return cls(model, optimizer, optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS), pruner)

    def state_dict(self) -> dict[str, Any]:
        parts = ("pruner", "model", "optimizer", "scheduler")
        states = {name: getattr(self, name).state_dict() for name in parts}
        return {**states, "rng": torch.get_rng_state(), "epoch": self.step // STEPS_AN_EPOCH, "step": self.step}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.pruner.load_state_dict(saved["pruner"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"])
        self.step = saved["step"]

    def take_a_step(self) -> None:
        """Take a step; with the last one of an epoch comes what ends an epoch."""
        epoch, position = divmod(self.step, STEPS_AN_EPOCH)
        order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(epoch))
        x, y = (t[order.chunk(STEPS_AN_EPOCH)[position]] for t in batch(EXAMPLES))
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.step += 1
        if self.step % STEPS_AN_EPOCH == 0:
            self.scheduler.step()
            self.pruner.step()


def checkpoint(run: Run) -> bytes:
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file wholly or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--linger", type=int, help="after this step, save the last checkpoint again and again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run.new(options.seed)
    if options.resume:
        run.load_state_dict(torch.load(options.path, weights_only=True))
    saved = checkpoint(run)
    while run.step < STEPS:
        run.take_a_step()
        if run.step % SAVE_EVERY == 0:
            saved = checkpoint(run)
            write(options.path, saved)
        while run.step == options.linger:
            write(options.path, saved)
            print(run.step, flush=True)


if __name__ == "__main__":
    main()
