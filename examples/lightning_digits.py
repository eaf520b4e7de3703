"""HGNP under Lightning: a residual network loses half of its neurons while it learns to read digits.

The LightningModule returns a FlatKFAC from ``configure_optimizers``; the NeuronPruning callback does the rest. The best
checkpoint is then loaded as where it is used. The images are scikit-learn's digits.

Run it with ``python -m examples.lightning_digits``; ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import examples.torchvision_models  # noqa: F401  # Lightning imports torchvision, which fails beside some builds of torch

# isort: split
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from examples.digits import DigitsNet, Images, load_data, share, whole
from kfac_flat import FlatKFAC
from kfac_flat.integrations.lightning import NeuronPruning, load_pruned


class Digits(LightningModule):
    """A DigitsNet and how it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = DigitsNet(width)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the share of a batch that is recognised."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        """Return the wrapped optimizer and its schedule."""
        inner = SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        optimizer = FlatKFAC(inner, self.net)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, self.trainer.max_epochs or 1)}


class Progress(Callback):
    """Prints a line for each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what has been logged; comes after NeuronPruning."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        removed, accuracy = logged["pruning/sparsity"], 100 * logged["accuracy"]
        print(f"epoch {trainer.current_epoch + 1}: {removed:.0%} of neurons removed, accuracy {accuracy:.2f} %")


def loader(data: Images, shuffle: bool) -> DataLoader[Any]:
    """Return batches of 64 images, in random order for training."""
    return DataLoader(TensorDataset(data.images, data.labels), 64, shuffle=shuffle, drop_last=shuffle)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lightning_digits",
        description="HGNP under Lightning, on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=whole(3), default=8, help="of training, at least 3")
    parser.add_argument("--width", type=whole(2), default=16, help="channels of the first layers")
    parser.add_argument("--target", type=share, default=0.5, help="share of neurons to remove")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="folder for checkpoints")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seed_everything(options.seed, verbose=False)
    train_set, test_set = load_data("cpu")

    pruning = NeuronPruning(target=options.target, start=1, events=max(1, options.epochs // 2))
    last = ModelCheckpoint(options.out, filename="last", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=options.epochs,
        callbacks=[pruning, Progress(), last],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Digits(options.width), loader(train_set, True), loader(test_set, False), ckpt_path=options.resume)

    loaded = load_pruned(Digits(options.width), last.best_model_path)
    (found,) = trainer.validate(loaded, loader(test_set, False), verbose=False)
    parameters = sum(p.numel() for p in loaded.parameters())
    print(f"{last.best_model_path}: {parameters:,} parameters, accuracy {100 * found['accuracy']:.2f} %")


if __name__ == "__main__":
    main()
