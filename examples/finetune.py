"""Fine-tune a pretrained network of torchvision on images of your own, and make it smaller on the way.

``--weights`` is a state dict as torchvision's models have it, loaded into ``--arch`` without its head, which is made
anew for the classes at hand. ``--data`` is a folder with one folder of images per class, a quarter of which is held out
to test on. Without the two, a network that knows nothing yet learns to read scikit-learn's digits, enlarged and in RGB.
What is saved are the weights of the smaller network and what it has left of each layer.

Run it with ``python -m examples.finetune``; ``--help`` tells the options. To save a file of weights::

    torch.save(torchvision.models.resnet18(weights="DEFAULT").state_dict(), "resnet18.pt")
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from examples.digits import Epoch, Settings, at_least_zero, load_data, share, whole
from examples.digits_report import Display
from examples.torchvision_models import datasets, models, transforms
from kfac_flat import FlatKFAC, NeuronPruner

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images torchvision's networks were trained on
SEVERAL_OUTPUTS = ("googlenet", "inception_v3")  # auxiliary heads, which want a loss of their own

Example: TypeAlias = tuple[Tensor, Tensor]

# ---------------------------------------------------------------- the data


@dataclass(frozen=True)
class Data:
    """Training and test examples: an image ``[3, size, size]`` and the place of its class among ``classes``."""

    train: Dataset[Example]
    test: Dataset[Example]
    classes: Sequence[str]


def load_folder(folder: Path, size: int) -> Data:
    """Read ``folder/CLASS/IMAGE``; always the same quarter of each class is for testing."""
    prepare = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    try:
        images = datasets.ImageFolder(str(folder), prepare)
        parts = train_test_split(range(len(images)), test_size=0.25, stratify=images.targets, random_state=0)
    except (FileNotFoundError, ValueError) as error:  # no images; too few of a class
        raise SystemExit(f"--data {folder} must hold one folder of images per class: {error}") from error
    train, test = (Subset(images, part) for part in parts)
    return Data(train, test, images.classes)


def load_digits(size: int) -> Data:
    """Enlarge scikit-learn's digits, in RGB."""
    prepare = transforms.Compose([transforms.Resize(size), transforms.Normalize(MEAN, DEVIATION)])
    train, test = (TensorDataset(prepare(part.images.expand(-1, 3, -1, -1)), part.labels) for part in load_data("cpu"))
    return Data(train, test, [str(digit) for digit in range(10)])


# ---------------------------------------------------------------- the network


def pretrained(arch: str, classes: int, weights: Path | None) -> nn.Module:
    """Build a network for so many classes, everything but its head with the given weights."""
    model: nn.Module = models.get_model(arch, num_classes=classes)
    if weights is None:
        return model
    saved = torch.load(weights, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise SystemExit(f"--weights {weights} holds no state dict but a {type(saved).__name__}")
    own = model.state_dict()
    saved.update({name: own[name] for name in head(arch)})
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        raise SystemExit(f"--weights {weights} are not those of torchvision's {arch}: {error}") from error
    return model


def head(arch: str) -> set[str]:
    """Names of the weights whose shape depends on the number of classes."""
    with torch.device("meta"):
        two, three = (models.get_model(arch, num_classes=classes).state_dict() for classes in (2, 3))
    return {name for name in two if two[name].shape != three[name].shape}


# ---------------------------------------------------------------- training


def finetune(
    model: nn.Module, data: Data, settings: Settings, mu: float, target: float, on_epoch: Callable[[Epoch], None]
) -> NeuronPruner:
    """Train a network that loses neurons on the way."""
    shuffle = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(data.train))
    batches = DataLoader(data.train, size, shuffle=True, drop_last=True, generator=shuffle)
    example = data.test[0][0].unsqueeze(0).to(settings.device)

    optimizer = FlatKFAC(SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4), model, mu=mu)
    pruner = NeuronPruner(model, optimizer, example, target=target, start=settings.start, events=settings.events)
    schedule = OneCycleLR(optimizer, settings.lr, epochs=settings.epochs, steps_per_epoch=len(batches))

    for _ in range(settings.epochs):
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(settings.device)), labels.to(settings.device)).backward()
            optimizer.step()
            schedule.step()
        on_epoch(Epoch(accuracy(model, data.test, settings), pruner.sparsity, optimizer.rho))
        pruner.step()  # the model gets smaller here
    return pruner


def accuracy(model: nn.Module, data: Dataset[Example], settings: Settings) -> float:
    """Return the share of images (%) whose class is recognised."""
    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in DataLoader(data, settings.batch_size):
            right += int((model(images.to(settings.device)).argmax(1).cpu() == labels).sum())
            total += len(labels)
    return 100 * right / total


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    settings = Settings(
        epochs=options.epochs, lr=options.lr, device=options.device, seed=options.seed, batch_size=options.batch_size
    )
    data = load_folder(options.data, options.size or 224) if options.data else load_digits(options.size or 32)
    torch.manual_seed(options.seed)
    model = pretrained(options.arch, len(data.classes), options.weights).to(options.device)
    if options.weights is None:
        console.print("no --weights were given: training starts from random ones")
    with Display(console) as display, display.task(options.arch, options.epochs) as on_epoch:
        pruner = finetune(model, data, settings, options.mu, options.target, on_epoch)

    checkpoint = {
        "arch": options.arch,
        "classes": list(data.classes),
        "pruner": pruner.state_dict(),
        "model": model.state_dict(),
    }
    torch.save(checkpoint, options.out / "checkpoint.pt")
    for what in ("neurons", "parameters", "macs"):
        before, after = getattr(pruner.history[0].before, what), getattr(pruner.size, what)
        console.print(f"{before:,} -> {after:,} {what}")
    console.print(f"The smaller network: {options.out / 'checkpoint.pt'}. To use it:", soft_wrap=True)
    console.print(LOADING, markup=False)
    console.print(f"{time.perf_counter() - start:.0f} s in all; torch {torch.__version__}, {options.device}")


LOADING = """
    saved = torch.load("checkpoint.pt", weights_only=True)
    model = torchvision.models.get_model(saved["arch"], num_classes=len(saved["classes"]))
    kfac_flat.shrink(model, saved["pruner"]).load_state_dict(saved["model"])
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune",
        description="Fine-tune a network of torchvision while it loses neurons.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", default="resnet18", help="a classifier of torchvision, by name")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="its pretrained weights, a state dict")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images in a folder per class; else digits")
    parser.add_argument("--size", type=whole(8), help="pixels of an image; else 224, and 32 for digits")
    parser.add_argument("--target", type=share, default=0.5, help="share of the neurons to remove, in (0, 1)")
    parser.add_argument("--mu", type=at_least_zero, default=0.003, help="weight of the curvature penalty")
    parser.add_argument("--epochs", type=whole(2), default=6, help="epochs of training, at least 2")
    parser.add_argument("--lr", type=float, default=0.02, help="peak of the one-cycle learning rate")
    parser.add_argument("--batch-size", type=whole(2), default=64, help="images in a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights and the order of the images")
    parser.add_argument("--device", default="cpu", help="torch device to run on: cpu, cuda, mps, ...")
    parser.add_argument("--threads", type=whole(1), default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder for the checkpoint")
    options = parser.parse_args(arguments)
    if options.arch not in models.list_models(module=models):
        parser.error(f"--arch {options.arch}: torchvision has no such classifier")
    if options.arch in SEVERAL_OUTPUTS:
        parser.error(f"--arch {options.arch} must have one output, and in training this one has several")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights {options.weights}: there is no such file")
    if options.data and not options.data.is_dir():
        parser.error(f"--data {options.data}: there is no such folder")
    if options.out.is_file():
        parser.error(f"--out {options.out}: this is a file, not a folder")
    return options


if __name__ == "__main__":
    main()
