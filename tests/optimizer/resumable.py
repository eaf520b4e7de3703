"""A training to be saved and killed at any time; ``test_resume.py`` runs it in processes of its own."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam

from kfac_flat import FlatKFAC
from tests.optimizer.loops import MakeBase, train
from tests.reference import seeded

BASES: dict[str, MakeBase] = {
    "sgd": lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda m: Adam(m.parameters(), lr=0.01),
}
SHAPE = (8, 2, 5, 5)


def network() -> nn.Module:
    """With dropout and running statistics."""

    def make() -> nn.Module:
        convolution = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3)]
        return nn.Sequential(*convolution, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 3))

    return seeded(make, dtype=torch.float32)


def fresh(base: str = "sgd", **options: Any) -> tuple[nn.Module, FlatKFAC]:
    model = network()
    options = {"mu": 0.3, "every": 3, "clip": None, **options}
    return model, FlatKFAC(BASES[base](model), model, **options)


def main() -> None:
    """Go on from a checkpoint if there is one, take steps, save, and die without a chance to clean up."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True)
    given = parser.parse_args()
    model, optimizer = fresh(given.base)
    if given.start:
        saved = torch.load(given.path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, given.steps, start=given.start, shape=SHAPE)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, given.path)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
