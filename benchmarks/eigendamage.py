"""EigenDamage against pruning in parameter coordinates: C-OBD, C-OBS, Kron-OBD and Kron-OBS, at equal parameters.

The comparison of Wang et al. [arXiv 1905.05934] at reduced scale: a narrow VGG, a ResNet of four blocks, and their wide
ResNet-32 at a fraction of its width, are trained on CIFAR-10 at 16 x 16 pixels (the first 10,000 training and 2,000
test images, see :mod:`benchmarks.policy`), lose a share ``level`` of their parameters in one pass or in three, and are
fine-tuned. All methods start from the same trained network, read the Fisher on the same images, and see the same
batches afterwards; a layer loses at most 95 % of its neurons or directions in a single pass, and half of what it has in
each of three.

Each run adds a line to ``runs.jsonl``; runs that are there already are not repeated, so the command can be stopped and
given again. Run it with ``python -m benchmarks.eigendamage --data-root DATA`` (``pip install -e
".[benchmark,examples]"``); ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from baselines import ChannelOBDPruner, ChannelOBSPruner, EigenDamagePruner, KronOBDPruner, KronOBSPruner
from benchmarks.commands import Parser, begin
from benchmarks.images import load_small_cifar
from benchmarks.networks import CifarNet, cifar_resnet
from benchmarks.policy import by_seed
from benchmarks.records import Record, circumstances, how_made, make_missing, read_records, spread, write_tables
from examples.digits import Images, accuracy, share, whole

# The paper has no floors under the layers but those of a single removal, see max_step below.
METHODS: dict[str, Callable[..., Any]] = {
    "C-OBD": partial(ChannelOBDPruner, max_share=1.0),
    "C-OBS": partial(ChannelOBSPruner, max_share=1.0),
    "Kron-OBD": partial(KronOBDPruner, max_share=1.0),
    "Kron-OBS": partial(KronOBSPruner, max_share=1.0),
    "EigenDamage": EigenDamagePruner,
}
BATCH_SIZE = 128
IDENTITY = ("network", "method", "passes", "level", "seed", "width", "epochs", "tuning", "seen", "fisher")


# ---------------------------------------------------------------- networks


def vgg(width: int) -> nn.Sequential:
    """Three pairs of 3 x 3 convolutions with BatchNorm, of one, two and four times the width."""
    layers: list[nn.Module] = []
    channels = 3
    for wide in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            channels = wide
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet(width: int) -> nn.Module:
    """The residual network of :mod:`benchmarks.policy`, four blocks behind a stem of stride 2."""
    return CifarNet((width, width, width, 2 * width, 4 * width), stride=2)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"vgg": vgg, "resnet": resnet, "wrn32": partial(cifar_resnet, 32)}


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Dense:
    """A trained network, and its test accuracy (%) after the fine-tuning that the pruned ones get."""

    model: nn.Module
    accuracy: float


def train_epoch(
    model: nn.Module, optimizer: SGD, schedule: LRScheduler, batches: Iterator[tuple[Tensor, Tensor]]
) -> None:
    """Make one optimizer step a batch, and one step of the schedule."""
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()


def batches_of(data: Images, seen: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch over a share of the images."""
    return islice(data.batches(BATCH_SIZE, generator), steps_of(data, seen))


def steps_of(data: Images, seen: float) -> int:
    """Batches in such an epoch."""
    return max(1, int(seen * len(data.labels)) // BATCH_SIZE)


def pretrain(record: Record, train_set: Images, test_set: Images) -> Dense:
    """Train the dense network."""
    torch.manual_seed(record["seed"])
    shuffle = torch.Generator().manual_seed(record["seed"])
    model = NETWORKS[record["network"]](record["width"])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = steps_of(train_set, record["seen"])
    schedule = OneCycleLR(optimizer, 0.1, epochs=record["epochs"], steps_per_epoch=steps)
    for _ in range(record["epochs"]):
        train_epoch(model, optimizer, schedule, batches_of(train_set, record["seen"], shuffle))
    tuned = copy.deepcopy(model)
    fine_tune(tuned, fine_tuner(tuned), record, train_set)
    return Dense(model, accuracy(tuned, test_set))


def fine_tuner(model: nn.Module) -> SGD:
    """Make the optimizer of the fine-tuning."""
    return SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)


def fine_tune(
    model: nn.Module, optimizer: SGD, record: Record, train_set: Images, before_epoch: Callable[[], Any] = lambda: None
) -> None:
    """Train on, with a learning rate that falls to zero."""
    shuffle = torch.Generator().manual_seed(record["seed"])
    schedule = CosineAnnealingLR(optimizer, record["tuning"] * steps_of(train_set, record["seen"]))
    for _ in range(record["tuning"]):
        before_epoch()
        train_epoch(model, optimizer, schedule, batches_of(train_set, record["seen"], shuffle))


def prune(record: Record, dense: Dense, train_set: Images, test_set: Images) -> Record:
    """Prune a copy of the trained network, fine-tune it, and say what came of it."""
    start = time.perf_counter()
    model, passes = copy.deepcopy(dense.model), record["passes"]
    optimizer = fine_tuner(model)
    pruner = METHODS[record["method"]](
        *(model, optimizer, train_set.images[:1]),
        data=train_set.images[: record["fisher"]].split(BATCH_SIZE),
        target=record["level"],
        budget="parameters",
        start=1,
        every=max(1, record["tuning"] // passes),
        events=passes,
        pace="linear",
        max_step=0.95 if passes == 1 else 0.5,
        seed=record["seed"],
    )
    before, at_once = pruner.size, list[float]()

    def end_epoch() -> None:
        pruner.step()
        if not at_once:
            at_once.append(accuracy(model, test_set))

    fine_tune(model, optimizer, record, train_set, end_epoch)
    size = asdict(pruner.size)
    return {
        "accuracy": accuracy(model, test_set),
        "dense_accuracy": dense.accuracy,
        "accuracy_after_first_pass": at_once[0],
        **{what: size[what] for what in ("neurons", "parameters", "macs")},
        **{f"dense_{what}": getattr(before, what) for what in ("parameters", "macs")},
        "reached": pruner.progress >= record["level"] - 1e-9,
        "seconds": round(time.perf_counter() - start, 2),
    }


# ---------------------------------------------------------------- all runs


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for; those that start from the same trained network come one after the other."""
    for seed in options.seeds:
        for network in options.networks:
            for level in options.levels:
                for passes in options.passes:
                    for method in options.methods:
                        which = {"network": network, "method": method, "passes": passes, "level": level, "seed": seed}
                        yield which | settings(options)


def settings(options: argparse.Namespace) -> Record:
    """What all runs have in common."""
    return {name: getattr(options, name) for name in ("width", "epochs", "tuning", "seen", "fisher")}


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda: load_small_cifar(options.data_root))

    @lru_cache(1)  # runs that start from the same trained network come one after the other
    def dense(network: str, seed: int) -> Dense:
        return pretrain({"network": network, "seed": seed, **settings(options)}, *data())

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        return prune(record, dense(record["network"], record["seed"]), *data())

    about = circumstances(options.command, options.threads)
    make_missing(planned(options), IDENTITY, lambda _: options.runs, make, about, console)


# ---------------------------------------------------------------- the report


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """Lay out one table per network and level, one row per method and number of passes."""
    for network, level in sorted({(r["network"], r["level"]) for r in records}, key=str):
        own = [r for r in records if (r["network"], r["level"]) == (network, level)]
        title = f"{network}, {level:.0%} of the parameters removed"
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for heading in ("passes", "accuracy %", "minus dense", "at once %", "seeds", "parameters", "MACs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for passes, method in dict.fromkeys((r["passes"], r["method"]) for r in own):
            table.add_row(method, str(passes), *row(list(by_seed(own, passes=passes, method=method).values())))
        yield table


def row(runs: Sequence[Record]) -> list[str]:
    """Write what is known of a method; a star says that the caps did not let all runs reach the level."""
    fewer = [mean(r[f"dense_{what}"] / r[what] for r in runs) for what in ("parameters", "macs")]
    return [
        spread([r["accuracy"] for r in runs]),
        spread([r["accuracy"] - r["dense_accuracy"] for r in runs], "{:+.2f}"),
        spread([r["accuracy_after_first_pass"] for r in runs]),
        str(len(runs)),
        f"{fewer[0]:.2f}x fewer{'' if all(r['reached'] for r in runs) else ' *'}",
        f"{fewer[1]:.2f}x fewer",
    ]


def report(options: argparse.Namespace, console: Console) -> None:
    """Print and write the tables of all runs that are there, with how these were made."""
    records = read_records(options.runs)
    if not records:
        raise SystemExit(f"{options.runs} holds no runs yet")
    write_tables(options.out / "table.txt", tables(records), [*EXPLANATION, *how_made(records)], console)


EXPLANATION = (
    "accuracy after fine-tuning, mean ± standard deviation over seeds; minus dense: paired by seed, against the dense",
    "network after the same fine-tuning; at once: after the first pass, before any fine-tuning; * the caps on what a",
    "layer may lose did not let every run reach the level",
)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    if not options.report:
        run_all(options, console)
    report(options, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("eigendamage", "Compare EigenDamage with pruning in parameter coordinates at equal parameters.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="what is pruned")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="how")
    parser.add_argument("--levels", nargs="+", type=share, default=[0.6, 0.8, 0.9], metavar="SHARE", help="parameters")
    parser.add_argument(
        "--passes", nargs="+", type=whole(1), default=[1, 3], help="removals, with fine-tuning in between"
    )
    parser.add_shared("--seeds", default=[0, 1])
    parser.add_argument("--width", type=whole(1), default=16, help="channels of the first layer")
    parser.add_argument("--epochs", type=whole(1), default=20, help="of training before")
    parser.add_argument("--tuning", type=whole(1), default=6, help="epochs of fine-tuning, the passes among them")
    parser.add_argument("--seen", type=share, default=0.25, metavar="SHARE", help="images seen in an epoch, drawn anew")
    parser.add_argument("--fisher", type=whole(1), default=512, help="images on which the Fisher is read")
    parser.add_shared("--data-root", help="folder with cifar-10-batches-py/, as torchvision reads it")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("benchmarks/results/eigendamage"))
    parser.add_argument("--report", action="store_true", help="lay out the runs that are there, and run nothing")
    options = parser.read(arguments)
    options.runs = options.out / "runs.jsonl"
    return options


if __name__ == "__main__":
    main()
