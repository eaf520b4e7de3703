"""Which of FlatKFAC's settings keeps most accuracy: its options compared, one change at a time, beside SGD and SAM.

Every run trains a network from scratch as in :mod:`benchmarks.accuracy`, with small data sets and few epochs so that
many settings, seeds and sparsities can be had: ``digits``; ``mnist-mlp`` and ``mnist-lenet5`` on 5,000 images of MNIST
(LeNet-300-100 and LeNet-5); ``cifar``, the residual network of :mod:`benchmarks.policy` on 10,000 images of CIFAR-10 at
16 x 16 pixels, a quarter of them in each epoch. All train at the learning rate that SGD does best with. Sparsity 0 is
the dense network. Neurons are chosen by NeuronPruner under SGD and SAM as well; only the optimizer differs.

A setting is written as what differs from FlatKFAC's defaults: ``default``, ``mu=0.1``, ``mu=0.1+penalty=log``; ``sgd``
and ``sam``, or ``sam=0.1`` at another distance than 0.05, are the others. Each run adds a line to ``TASK.jsonl``; runs
that are there already are not repeated. Run it with ``python -m benchmarks.defaults`` (``pip install -e
".[benchmark,examples]"``); ``--help`` tells the options,
``--report`` writes the tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from baselines import SAM
from benchmarks import policy
from benchmarks.accuracy import run
from benchmarks.commands import Parser, begin, share
from benchmarks.images import load_mnist
from benchmarks.methods import Method
from benchmarks.records import (
    Record,
    circumstances,
    how_made,
    identity,
    in_file_of_task,
    make_missing,
    read_records,
    spread,
    write_tables,
)
from benchmarks.tasks import CRITERION, TASKS
from benchmarks.training import Training
from examples.digits import Images
from kfac_flat import FlatKFAC

RESULTS = Path("benchmarks/results/defaults")

# ---------------------------------------------------------------- what is compared

SGD, SHARPNESS_AWARE = "sgd", "sam"
# The batch's own labels, all layers, whole batches and no step without a refresh: the most that can be had, for twice
# the cost of a step.
THOROUGH = "penalty=linear+fisher=empirical+reduction=sum+every=1+batch_fraction=1"
READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("mu", "rho_max", "batch_fraction", "clip"), float),
    **dict.fromkeys(("every", "survey_every"), int),
    **dict.fromkeys(("penalty", "reduction", "fisher"), str),
}
# Every option by itself, all else as it is by default.
SETTINGS = (
    SGD,
    *(f"{SHARPNESS_AWARE}={distance}" for distance in (0.05, 0.1)),
    "default",
    *(f"batch_fraction={share}" for share in (0.5, 1)),
    *(f"every={steps}" for steps in (4, 16)),
    "reduction=sum",
    "fisher=empirical",
    *(f"mu={mu}" for mu in (0.001, 0.01, 0.03)),
    "penalty=linear",
    f"mu=0.1+{THOROUGH}",
)


def optimizer_of(setting: str) -> Callable[[Optimizer, nn.Module], Optimizer]:
    """Read a setting.

    Raises:
        ValueError: if there is no such option, or its value cannot be read.
    """
    if setting == SGD:
        return lambda base, model: base
    name, _, distance = setting.partition("=")
    if name == SHARPNESS_AWARE:
        return partial(SAM, criterion=CRITERION, **({"rho": float(distance)} if distance else {}))
    options = {}
    for part in [] if setting == "default" else setting.split("+"):
        option, _, value = part.partition("=")
        if option not in READ:
            raise ValueError(f"{part} is none of {', '.join(READ)} with a value")
        options[option] = READ[option](value)
    return partial(FlatKFAC, criterion=CRITERION, **options)


# ---------------------------------------------------------------- tasks


def load_part_of_mnist(root: Path | None, count: int = 5000) -> tuple[Images, Images]:
    """Read the first training images of MNIST, and all test images."""
    train, test = load_mnist(root)
    return Images(train.images[:count], train.labels[:count]), test


# Without a penalty, the best peak of the learning rate is 0.2 of 0.05, 0.1, 0.2 and 0.4 for both networks on MNIST, and
# 0.1 of 0.05, 0.1 and 0.2 for the one on CIFAR-10.
SMALL_TASKS = {
    "digits": TASKS["digits"],
    "mnist-mlp": replace(TASKS["mnist-mlp"], load=load_part_of_mnist),
    "mnist-lenet5": replace(TASKS["mnist-lenet5"], load=load_part_of_mnist, lr=0.2, epochs=12, last=7),
    "cifar": policy.TASKS["cifar"],
}

# ---------------------------------------------------------------- all runs


IDENTITY = ("task", "setting", "sparsity", "seed")


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for task in options.tasks:
            for sparsity in options.sparsity:
                for setting in options.settings:
                    yield {"task": task, "setting": setting, "sparsity": sparsity, "seed": seed}


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda name: SMALL_TASKS[name].load(options.data_root))

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        name, setting, sparsity, seed = identity(record, IDENTITY)
        task = SMALL_TASKS[name]
        return run(Training(task, Method(optimizer_of(setting)), sparsity, seed, task.epochs), data(name))

    about = circumstances(options.command, options.threads)
    make_missing(planned(options), IDENTITY, in_file_of_task(options.out), make, about, console)


# ---------------------------------------------------------------- what is told


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """For each task, accuracy by setting and sparsity, and how much that is above SGD's from the same seeds."""
    for task in dict.fromkeys(r["task"] for r in records):
        own = [r for r in records if r["task"] == task]
        levels = sorted({r["sparsity"] for r in own})
        table = Table(box=SIMPLE_HEAD, title=f"{task}: last-epoch test accuracy, % (difference to SGD, same seeds)")
        table.add_column("setting")
        for level in levels:
            table.add_column(f"{level:.0%} removed", justify="right")
        table.add_column("rho at 0 %", justify="right")
        table.add_column("sharpness at 0 %", justify="right")
        for setting in dict.fromkeys(r["setting"] for r in own):
            dense = by_seed(own, setting, 0).values()
            flatness = [spread([r[name] for r in dense], "{:.3g}") if dense else "" for name in ("rho", "sharpness")]
            table.add_row(setting, *(cell(own, setting, level) for level in levels), *flatness)
        yield table


def by_seed(records: Iterable[Record], setting: str, level: float) -> dict[int, Record]:
    """Runs of one kind."""
    return {r["seed"]: r for r in records if r["setting"] == setting and r["sparsity"] == level}


def cell(records: Sequence[Record], setting: str, level: float) -> str:
    """Mean and standard deviation over seeds; then those of the difference to SGD, seed by seed."""
    own, reference = by_seed(records, setting, level), by_seed(records, SGD, level)
    if not own:
        return ""
    written = spread([r["accuracy"] for r in own.values()])
    differences = [r["accuracy"] - reference[seed]["accuracy"] for seed, r in own.items() if seed in reference]
    return written if setting == SGD or not differences else f"{written} ({spread(differences, '{:+.2f}')})"


def report(options: argparse.Namespace, console: Console) -> None:
    """Write the tables of all runs there are, with how these were made."""
    records = [r for task in SMALL_TASKS for r in read_records(options.out / f"{task}.jsonl")]
    if not records:
        raise SystemExit(f"there are no runs in {options.out}")
    write_tables(options.out / "tables.txt", tables(records), how_made(records), console, width=200)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options, width=200)
    (report if options.report else run_all)(options, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("defaults", "Compare FlatKFAC's settings by the accuracy that is left at given sparsities.")
    parser.add_argument("--tasks", nargs="+", choices=SMALL_TASKS, default=list(SMALL_TASKS), help="what to train on")
    parser.add_argument("--settings", nargs="+", type=known_setting, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0.0, 0.5, 0.75, 0.9], metavar="SHARE")
    parser.add_shared("--seeds", default=list(range(5)))
    parser.add_shared("--data-root", help="folder with MNIST/ and cifar-10-batches-py/, as of torchvision")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write the tables of the runs there are, and run nothing")
    return parser.read(arguments)


def known_setting(text: str) -> str:
    """See that there is such a setting."""
    try:
        optimizer_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    main()
