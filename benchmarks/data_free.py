"""Data-free pruning on MNIST: how many parameters go at what loss of accuracy, with no data and no training.

Published [Srinivas & Babu, arXiv 1507.06149]: about 85 % of the parameters of a LeNet-like network. Here both LeNets
are trained with SGD, once per seed, weight decay and factor of the initial weights, and each trained network is pruned
to every share by :class:`baselines.DataFreePruner`, with neurons compared as they are and by their directions, and to
the automatic cut-off; and to every share in the same layers by magnitude, for comparison. Nothing is trained
afterwards. Convolutions stay.

What can be merged is what training has made alike. A neuron keeps the random numbers that it began with unless weight
decay takes them away, so that a network trained in a few epochs from torch's usual initial weights has few neurons
alike; one whose Linear layers start from a tenth of these has many. ``--held-out`` measures on the last of the training
images instead of the test images, for settings to be chosen by.

Run it with ``python -m benchmarks.data_free --data-root DATA`` (``pip install -e ".[benchmark,examples]"``), DATA being
the folder with MNIST/raw/, as torchvision reads it; ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from baselines import DataFreePruner, MagnitudePruner
from benchmarks.commands import Parser, begin
from benchmarks.pruner_speed import write
from benchmarks.records import progress_bar, spread
from examples.digits import Images, whole
from examples.torchvision_models import datasets
from kfac_flat import NeuronPruner

DENSE, CUT_OFF, DIRECTIONS = "dense", "cut-off", "data-free, directions"
RECIPE = ("weight_decay", "initial")


def lenet_300_100() -> nn.Module:
    """Two hidden layers: 266,610 parameters."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet_5() -> nn.Module:
    """Two convolutions and a hidden layer, as in Caffe and the paper: 431,080 parameters."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5}
EPOCHS = {"lenet-300-100": 6, "lenet-5": 1}


# ---------------------------------------------------------------- training


def load(root: Path, train: bool, count: int | None) -> Images:
    """Return the first so many images of MNIST, ``[N, 1, 28, 28]`` in [0, 1], and their digits."""
    data = datasets.MNIST(root, train=train)
    return Images(data.data[:count].unsqueeze(1).float() / 255, data.targets[:count])


def split(images: Images, held_out: int) -> tuple[Images, Images]:
    """Part the last so many images from the others."""
    count = len(images.labels) - held_out
    first, last = (Images(images.images[part], images.labels[part]) for part in (slice(count), slice(count, None)))
    return first, last


def trained(
    network: str, images: Images, epochs: int, weight_decay: float, seed: int, initial: float = 1.0
) -> nn.Module:
    """Train a network whose Linear layers start from ``initial`` times torch's usual weights."""
    torch.manual_seed(seed)
    model, generator = NETWORKS[network](), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (
            p for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()
        ):
            parameter.mul_(initial)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=epochs * (len(images.labels) // 128))
    for _ in range(epochs):
        for x, y in images.batches(128, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percentage of the images that are told right."""
    parts = zip(images.images.split(1000), images.labels.split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * right / len(images.labels)


# ---------------------------------------------------------------- pruning


def pruned(model: nn.Module, method: type[NeuronPruner], x: Tensor, **options: Any) -> tuple[nn.Module, NeuronPruner]:
    """Return a copy of the model that has been pruned once."""
    small = copy.deepcopy(model)
    still = SGD(small.parameters(), lr=0.0)
    convolutions = [name for name, module in small.named_modules() if isinstance(module, nn.Conv2d)]
    usual = {"start": 1, "events": 1, "max_share": 1.0, "ignore": convolutions, "budget": "parameters"}
    pruner = method(small, still, x, **usual, **options)
    pruner.step()
    return small, pruner


def measure(model: nn.Module, test: Images, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Prune a trained network in all ways; returns what each has left."""
    x = test.images[:1]
    dense = sum(p.numel() for p in model.parameters())
    runs: list[dict[str, Any]] = [{"method": DENSE, "share": 0.0, "removed": 0.0, "accuracy": accuracy(model, test)}]

    def prune(name: str, method: type[NeuronPruner], share: float, **options: Any) -> None:
        small, pruner = pruned(model, method, x, target=share, **options)
        removed = 1 - pruner.size.parameters / dense
        found = {"method": name, "share": share, "removed": removed, "accuracy": accuracy(small, test)}
        runs.append(found | {"widths": pruner.widths})

    for share in shares:
        prune("data-free", DataFreePruner, share)
        prune(DIRECTIONS, DataFreePruner, share, homogeneous=True)
        prune("magnitude", MagnitudePruner, share)
    prune(CUT_OFF, DataFreePruner, max(shares), cut_off=True)
    return runs


# ---------------------------------------------------------------- results


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Lay out one row per network, recipe, method and share: mean and standard deviation over the seeds."""
    laid_out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    laid_out.add_column("network", no_wrap=True)
    for heading in ("weight decay", "initial weights"):
        laid_out.add_column(heading, justify="right", no_wrap=True)
    laid_out.add_column("method", no_wrap=True)
    for heading in ("parameters removed\n%", "test accuracy\n%", "change\npoints"):
        laid_out.add_column(heading, justify="right", no_wrap=True)
    for network, runs in results.items():
        kinds = (*RECIPE, "method", "share")
        dense = {start_of(run): run["accuracy"] for run in runs if run["method"] == DENSE}
        for kind in dict.fromkeys(tuple(run[what] for what in kinds) for run in runs):
            own = [run for run in runs if tuple(run[what] for what in kinds) == kind]
            removed = spread([100 * run["removed"] for run in own], "{:.1f}")
            change = spread([run["accuracy"] - dense[start_of(run)] for run in own], "{:+.2f}")
            accuracies = spread([run["accuracy"] for run in own])
            laid_out.add_row(network, f"{kind[0]:g}", f"x {kind[1]:g}", str(kind[2]), removed, accuracies, change)
    return laid_out


def start_of(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells of which trained network a run is."""
    return tuple(run[name] for name in (*RECIPE, "seed"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    data = load(options.data_root, True, options.images)
    if options.held_out:
        data, test = split(data, options.held_out)
    else:
        test = load(options.data_root, False, options.images)
    results: dict[str, list[dict[str, Any]]] = {}
    start = time.perf_counter()
    with progress_bar(console) as progress:
        tasks = list(itertools.product(options.networks, options.weight_decays, options.initials, options.seeds))
        task = progress.add_task("", total=len(tasks))
        for network, weight_decay, initial, seed in tasks:
            progress.update(task, description=f"{network}, weight decay {weight_decay:g}, initial x {initial:g}")
            model = trained(network, data, options.epochs or EPOCHS[network], weight_decay, seed, initial)
            runs = measure(model, test, options.shares)
            about = {"weight_decay": weight_decay, "initial": initial, "seed": seed}
            results.setdefault(network, []).extend(about | run for run in runs)
            progress.advance(task)
    found = {"seconds": round(time.perf_counter() - start), "networks": results}
    write(options, "mnist", found, table(results))
    console.print(table(results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("data_free", "Prune LeNets on MNIST without data and without training.")
    parser.add_shared("--data-root", required=True, help="folder with MNIST/raw/, as torchvision reads it")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="what to train")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.85], help="of the parameters to go"
    )
    parser.add_shared("--seeds", default=[0, 1])
    parser.add_argument("--epochs", type=whole(1), help="of training; each network has its own unless given")
    parser.add_argument("--weight-decays", nargs="+", type=float, default=[5e-4, 5e-3], help="in training")
    parser.add_argument("--initials", nargs="+", type=float, default=[1.0], help="factors of Linears' initial weights")
    parser.add_argument("--held-out", type=whole(1), help="measure on the last so many training images instead")
    parser.add_argument("--images", type=whole(1), help="use only the first so many of each part")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("benchmarks/results/data_free"))
    options = parser.read(arguments)
    options.peer, options.saliency = False, True  # torch-pruning takes no part
    return options


if __name__ == "__main__":
    main()
