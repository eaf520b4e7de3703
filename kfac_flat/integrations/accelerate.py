"""Accelerate: FlatKFAC and NeuronPruner are used as they are; this makes a checkpoint hold the pruner.

Needs the extra ``accelerate``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kfac_flat.pruning.scheduler import NeuronPruner

FILE = "neuron_pruner.pt"


def checkpoint_pruner(accelerator: Accelerator, pruner: NeuronPruner) -> None:
    """Let ``save_state`` save a pruner, and ``load_state`` cut the dense model before it loads the weights.

    ``register_for_checkpointing`` would load the pruner after the weights, which are too small for the dense model.

    Args:
        accelerator: What prepares, saves and loads the model.
        pruner: The model's pruner, made with the optimizer as it was before ``accelerator.prepare``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, events=1)
        >>> accelerator = Accelerator(cpu=True)
        >>> checkpoint_pruner(accelerator, pruner)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            torch.save(pruner.state_dict(), Path(folder, FILE))

    def load(models: list[Any], folder: str) -> None:
        pruner.load_state_dict(torch.load(Path(folder, FILE), map_location="cpu", weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
