"""HGNP with Accelerate: the plain loop, prepared, in bfloat16 and with accumulated gradients if you like.

FlatKFAC and NeuronPruner are made before ``accelerator.prepare`` and used as they are; ``checkpoint_pruner`` makes
saved states hold the pruner. The images are scikit-learn's digits.

Run it with ``python -m examples.accelerate_digits``; ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from examples.digits import DigitsNet, accuracy, load_data, share, whole
from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.integrations.accelerate import checkpoint_pruner


def train(options: argparse.Namespace) -> None:
    """Train a network that loses neurons on the way; save everything after each epoch."""
    precision = "bf16" if options.bf16 else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=options.accumulate)
    train_set, test_set = load_data("cpu")
    loader = DataLoader(
        TensorDataset(train_set.images, train_set.labels), 64 // options.accumulate, shuffle=True, drop_last=True
    )
    network = DigitsNet(options.width)
    optimizer = FlatKFAC(SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4), network)
    removals = max(1, options.epochs // 2)
    pruner = NeuronPruner(network, optimizer, train_set.images[:1], target=options.target, start=1, events=removals)
    schedule = CosineAnnealingLR(optimizer, options.epochs * len(loader) // options.accumulate)
    checkpoint_pruner(accelerator, pruner)
    model, prepared, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    if options.resume:
        accelerator.load_state(str(options.resume))

    while pruner.epoch < options.epochs:
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                prepared.step()
                schedule.step()
                prepared.zero_grad()
        found = f"accuracy {accuracy(model, test_set):.2f} %, rho {optimizer.rho:.3g}"
        pruner.step()  # the model gets smaller here
        accelerator.save_state(str(options.out))
        print(f"epoch {pruner.epoch}: {pruner.progress:.0%} of neurons removed, {found}")
    print(f"{options.out}: {pruner.size}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.accelerate_digits",
        description="HGNP with Accelerate, on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=whole(1), default=8, help="of training")
    parser.add_argument("--width", type=whole(2), default=16, help="channels of the first layers")
    parser.add_argument("--target", type=share, default=0.5, help="share of neurons to remove")
    parser.add_argument("--accumulate", type=int, choices=(1, 2, 4), default=2, help="micro-batches of a step")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, slow on most CPUs")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"), help="folder for the state")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on from this folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    set_seed(options.seed)
    train(options)


if __name__ == "__main__":
    main()
