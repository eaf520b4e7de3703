"""HGNP on a transformer: a small ViT reads digits as sequences of patches, under the Trainer of transformers.

Its heads and the hidden units of its MLPs compete; what LayerNorms take their statistics over stays whole. Each of
scikit-learn's 8 x 8 images becomes 16 tokens of 2 x 2 pixels. Nothing is downloaded.

Run it with ``python -m examples.transformer``; ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import examples.torchvision_models  # transformers imports torchvision, which fails beside some builds of torch

# isort: split
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from examples.digits import Images, load_data, share, whole
from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.integrations.transformers import NeuronPruning


def examples(data: Images) -> list[dict[str, Tensor]]:
    """Return each image, its values in [-1, 1], with its digit."""
    return [
        {"pixel_values": image, "labels": digit} for image, digit in zip(2 * data.images - 1, data.labels, strict=True)
    ]


def build(width: int) -> ViTForImageClassification:
    """Return two layers of four heads, untrained."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return ViTForImageClassification(config)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Return the share of images (%) whose digit is recognised."""
    return {"accuracy": 100 * float((found.predictions.argmax(1) == found.label_ids).mean())}


class Progress(TrainerCallback):
    """Prints a line for each epoch."""

    def __init__(self, optimizer: FlatKFAC, pruner: NeuronPruner) -> None:
        self.optimizer, self.pruner = optimizer, pruner

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Print what has been found."""
        found = f"accuracy {metrics['eval_accuracy']:.2f} %, rho {self.optimizer.rho:.3g}"
        print(f"epoch {round(state.epoch)}: {self.pruner.progress:.0%} of neurons removed, {found}", flush=True)


def train(options: argparse.Namespace) -> NeuronPruner:
    """Train a ViT that loses neurons on the way."""
    train_set, test_set = (examples(data) for data in load_data("cpu"))
    model = build(options.width)
    optimizer = FlatKFAC(AdamW(model.parameters(), lr=2e-3), model)
    example = {"pixel_values": train_set[0]["pixel_values"][None]}
    removals = max(1, options.epochs // 2)
    pruner = NeuronPruner(model, optimizer, example, target=options.target, start=1, events=removals)
    steps = -(-len(train_set) // 32)
    arguments = TrainingArguments(
        str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=accuracy,
        optimizers=(optimizer, CosineAnnealingLR(optimizer, options.epochs * steps)),
    )
    pruning = NeuronPruning(trainer, pruner)
    trainer.add_callback(pruning)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(optimizer, pruner))
    trainer.train(resume_from_checkpoint=pruning.restored(options.resume) if options.resume else None)
    return pruner


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.transformer",
        description="HGNP on a small ViT that reads scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=whole(2), default=8, help="of training, at least 2")
    parser.add_argument("--width", type=int, choices=(24, 32, 48, 64), default=32, help="of the embedding")
    parser.add_argument("--target", type=share, default=0.3, help="share of neurons to remove")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"), help="folder for checkpoints")
    parser.add_argument("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    set_seed(options.seed)
    pruner = train(options)
    print(f"{options.out}: {pruner.size}")
    for name, width in pruner.widths.items():
        if name not in pruner.frozen:
            print(f"  {name}: {len(pruner.survivors[name])} of {width + removed(pruner, name)}")


def removed(pruner: NeuronPruner, name: str) -> int:
    """Return how many neurons of a layer have gone."""
    return sum(len(report.removed.get(name, ())) for report in pruner.history)


if __name__ == "__main__":
    main()
