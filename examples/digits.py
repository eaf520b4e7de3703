"""HGNP on real images, in one command: a network loses three quarters of its neurons while it trains.

Three networks start from the same weights and see the same batches: one stays dense, one is trained and pruned by
HGNP (:class:`FlatKFAC` and :class:`NeuronPruner`), one is pruned on the same schedule without the curvature penalty.
The images are scikit-learn's digits, 1,797 of 8 x 8 pixels, part of its installation. The loop is in :func:`train`.

Run it with ``python -m examples.digits``; ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import kfac_flat
from examples import digits_report
from examples.digits_report import Display
from kfac_flat import FlatKFAC, NeuronPruner, Size

TIMED_BATCH = 256

# ---------------------------------------------------------------- the network


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """A residual network for 8 x 8 images: two blocks, the second of twice the width and half the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.block1 = ResidualBlock(width, width)
        self.block2 = ResidualBlock(width, 2 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        x = self.relu(self.norm(self.stem(x)))
        return self.head(self.pool(self.block2(self.block1(x))).flatten(1))


# ---------------------------------------------------------------- the data


@dataclass(frozen=True)
class Images:
    """Images ``[N, 1, 8, 8]`` with values in [0, 1], and their digits ``[N]``."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield full batches in random order; what is left over at the end of an epoch is not seen in it."""
        order = torch.randperm(len(self.labels), generator=generator, device=generator.device).to(self.labels.device)
        for chosen in order[: len(order) // size * size].view(-1, size):
            yield self.images[chosen], self.labels[chosen]


def load_data(device: str) -> tuple[Images, Images]:
    """Return the training (1,347) and test (450) images, always the same split, each digit in equal shares."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, device=device)
    parts = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train, test = (Images(images[part], labels[part]) for part in parts)
    return train, test


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Method:
    """One way to train: ``mu`` weighs the curvature penalty; ``target`` is the share of neurons to remove."""

    name: str
    mu: float = 0.0
    target: float | None = None


@dataclass(frozen=True)
class Settings:
    """What all methods have in common.

    Removals come at the end of each epoch between one sixth and three fifths of the training.
    """

    epochs: int = 24
    width: int = 32
    lr: float = 0.1
    device: str = "cpu"
    seed: int = 0
    batch_size: int = 64

    @property
    def start(self) -> int:
        """Epochs before the first removal."""
        return max(1, round(self.epochs / 6))

    @property
    def events(self) -> int:
        """Number of removals, one an epoch."""
        return max(1, round(0.6 * self.epochs) - self.start)


@dataclass(frozen=True)
class Epoch:
    """The model at the end of an epoch, before neurons go: test accuracy (%), share of neurons gone, rho."""

    accuracy: float
    sparsity: float
    rho: float


@dataclass
class Run:
    """One trained network, its history, and what it looks like; ``pruner`` is None for the dense one."""

    model: nn.Module
    pruner: NeuronPruner | None
    epochs: list[Epoch]
    size: Size
    widths: dict[str, int]
    milliseconds: float = math.nan

    @property
    def last(self) -> Epoch:
        """The finished network: the last epoch, never the best."""
        return self.epochs[-1]


def train(
    method: Method, settings: Settings, train_set: Images, test_set: Images, on_epoch: Callable[[Epoch], None]
) -> Run:
    """Train one network. What the library asks of a training loop: two constructors, and one call an epoch."""
    torch.manual_seed(settings.seed)
    shuffle = torch.Generator().manual_seed(settings.seed)
    model = DigitsNet(settings.width).to(settings.device)
    criterion = nn.CrossEntropyLoss()
    example = train_set.images[:1]

    optimizer: Optimizer = SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    if method.mu:
        optimizer = FlatKFAC(optimizer, model, mu=method.mu)
    pruner = None
    if method.target:
        pruner = NeuronPruner(
            model, optimizer, example, target=method.target, start=settings.start, every=1, events=settings.events
        )
    batches = len(train_set.labels) // settings.batch_size
    schedule = OneCycleLR(optimizer, settings.lr, epochs=settings.epochs, steps_per_epoch=batches)

    epochs = []
    for _ in range(settings.epochs):
        model.train()
        for images, labels in train_set.batches(settings.batch_size, shuffle):
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        epochs.append(measure(model, test_set, pruner.sparsity if pruner else 0.0))
        on_epoch(epochs[-1])
        if pruner:
            pruner.step()  # the model gets smaller here

    size, widths = (pruner.size, pruner.widths) if pruner else dense_size(model, example)
    return Run(model, pruner, epochs, size, widths)


# ---------------------------------------------------------------- measuring


def measure(model: nn.Module, test_set: Images, sparsity: float) -> Epoch:
    """Measure a network on the test set."""
    return Epoch(accuracy(model, test_set), sparsity, measured_rho(model, test_set.images))


def accuracy(model: nn.Module, data: Images) -> float:
    """Return the share of images (%) whose digit is recognised."""
    model.eval()
    with torch.inference_mode():
        right = model(data.images).argmax(1) == data.labels
    return 100 * right.sum().item() / len(right)


def measured_rho(model: nn.Module, images: Tensor) -> float:
    """Return the largest spectral radius among the layers, in eval mode, in the same way for every network."""
    return max(kfac_flat.spectral_radii(model.eval(), images, exact=True).values())


def dense_size(model: nn.Module, example: Tensor) -> tuple[Size, dict[str, int]]:
    """Return the size and the layers' widths of a network that nobody prunes."""
    counter = NeuronPruner(model, SGD(model.parameters()), example, target=0.5)
    return counter.size, counter.widths


def time_inference(runs: Sequence[Run], images: Tensor) -> None:
    """Time the networks on these images; sets the median of each."""
    calls = [partial(run.model.eval(), images) for run in runs]
    for run, milliseconds in zip(runs, median_milliseconds(calls, images.device), strict=True):
        run.milliseconds = milliseconds


def median_milliseconds(
    calls: Sequence[Callable[[], object]], device: torch.device, repetitions: int = 40
) -> list[float]:
    """Time calls in turns, so that a busy machine disturbs them alike."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for repetition in range(repetitions + 5):  # the first 5 are for warming up
            for call, seen in zip(calls, times, strict=True):
                synchronize(device)
                start = time.perf_counter()
                call()
                synchronize(device)
                if repetition >= 5:
                    seen.append(1000 * (time.perf_counter() - start))
    return [median(seen) for seen in times]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---------------------------------------------------------------- checkpoints


def save(path: Path, run: Run, settings: Settings) -> None:
    """Save a pruned network: what is left of each layer, and the weights."""
    assert run.pruner is not None
    checkpoint = {
        "width": settings.width,
        "pruner": run.pruner.state_dict(),
        "model": run.model.state_dict(),
        "accuracy": run.last.accuracy,
    }
    torch.save(checkpoint, path)


def evaluate_saved(path: Path, device: str, console: Console) -> None:
    """Load a pruned network as one would where it is used, without optimizer or pruner, and evaluate it."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    if "width" not in checkpoint:
        raise SystemExit(f"{path} was not saved by this example")
    model = DigitsNet(checkpoint["width"]).to(device)
    kfac_flat.shrink(model, checkpoint["pruner"])
    model.load_state_dict(checkpoint["model"])
    console.print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters")
    console.print(
        f"test accuracy {accuracy(model, load_data(device)[1]):.2f} %, saved with {checkpoint['accuracy']:.2f} %"
    )


# ---------------------------------------------------------------- the command


def train_each(
    methods: Sequence[Method], settings: Settings, train_set: Images, test_set: Images, display: Display, label: str
) -> list[Run]:
    """Train one network per method from the same initialisation, with a line for each."""
    runs = []
    for method in methods:
        with display.task(f"{method.name}{label}", settings.epochs) as on_epoch:
            runs.append(train(method, settings, train_set, test_set, on_epoch))
    return runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if options.load:
        evaluate_saved(options.load, options.device, console)
        return
    start = time.perf_counter()
    settings = Settings(options.epochs, options.width, options.lr, options.device, options.seed)
    methods = (
        Method("dense SGD"),
        Method("HGNP", options.mu, options.target),
        Method("same pruning, mu = 0", 0.0, options.target),
    )
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    train_set, test_set = load_data(options.device)
    all_settings = [replace(settings, seed=options.seed + i) for i in range(options.seeds)]
    with Display(console) as display:
        seeds = [
            train_each(methods, s, train_set, test_set, display, f", seed {s.seed}" if options.seeds > 1 else "")
            for s in all_settings
        ]
    for runs in seeds:
        time_inference(runs, test_set.images[:TIMED_BATCH])
    results = {method.name: list(runs) for method, runs in zip(methods, zip(*seeds, strict=True), strict=True)}

    save(options.out / "checkpoint.pt", results["HGNP"][0], all_settings[0])
    digits_report.print_table(console, results, TIMED_BATCH)
    digits_report.draw_history(results, options.out / "history.png", settings)
    digits_report.draw_widths(results, options.out / "widths.png")
    digits_report.write_page(results, options.out / "report.html")
    console.print(f"Pictures, page, checkpoint: {options.out}/ (history.png, widths.png, report.html, checkpoint.pt)")
    console.print(
        f"Evaluate the pruned network: python -m examples.digits --load {options.out / 'checkpoint.pt'}", soft_wrap=True
    )
    console.print(
        f"{time.perf_counter() - start:.0f} s in all; torch {torch.__version__}, {options.device}, "
        f"{torch.get_num_threads()} threads"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train and prune a small residual network on scikit-learn's digits; see what is left of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", type=share, default=0.75, help="share of the neurons to remove, in (0, 1)")
    parser.add_argument("--mu", type=at_least_zero, default=0.003, help="weight of the curvature penalty")
    parser.add_argument("--epochs", type=whole(2), default=Settings.epochs, help="epochs of training, at least 2")
    parser.add_argument("--lr", type=float, default=Settings.lr, help="peak of the one-cycle learning rate")
    parser.add_argument("--width", type=whole(2), default=Settings.width, help="channels of the first block")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    parser.add_argument("--seeds", type=whole(1), default=1, help="repeat with this many seeds: mean and deviation")
    parser.add_argument("--device", default="cpu", help="torch device to run on: cpu, cuda, mps, ...")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads; more rarely help such small networks")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder for pictures, page and checkpoint"
    )
    parser.add_argument("--load", type=Path, metavar="PATH", help="evaluate this checkpoint, and nothing else")
    options = parser.parse_args(arguments)
    if options.load and not options.load.is_file():
        parser.error(f"--load {options.load}: there is no such file")
    if options.out.is_file():
        parser.error(f"--out {options.out}: this is a file, not a folder")
    return options


def share(text: str) -> float:
    """Read a share between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} must lie between 0 and 1")
    return value


def at_least_zero(text: str) -> float:
    """Read a number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def whole(least: int) -> Callable[[str], int]:
    """Make a reader of whole numbers that are at least ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return value

    return number


if __name__ == "__main__":
    main()
