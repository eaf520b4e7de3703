"""Which way of choosing neurons keeps most accuracy: NeuronPruner's options compared, one change at a time.

Every run trains a network from scratch and removes most of its neurons on the way. With the same seed, all policies
start from the same weights, see the same batches and make their last removal at the end of the same epoch. Two tasks:
``digits``, network, data and recipe of :mod:`examples.digits`, each epoch over half of the images, drawn anew; and
``cifar``, a residual network of four blocks on 10,000 training and 2,000 test images of CIFAR-10 at 16 x 16 pixels,
each epoch over a quarter of them.

A policy is written as what differs from the plain one, which takes five equal steps, lets all layers compete, counts
scores per neuron and has no floors: ``plain``, ``pace=cubic``, ``normalize=l2+per=mac``. With ``FlatKFAC`` among its
parts, the optimizer has that penalty at its default weight. ``events=10`` makes the removals smaller and more frequent
over the same epochs. Level 0 is the dense network.

Each run adds a line to ``runs.jsonl``; runs that are there already are not repeated, so the command can be stopped and
given again. Run it with ``python -m benchmarks.policy`` (``pip install -e ".[benchmark,examples]"``); ``--help`` tells
the options.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD

from benchmarks import tasks
from benchmarks.commands import Parser, begin, share
from benchmarks.images import load_small_cifar
from benchmarks.networks import CifarNet
from benchmarks.records import (
    Record,
    circumstances,
    how_made,
    identity,
    make_missing,
    read_records,
    spread,
    write_tables,
)
from benchmarks.tasks import Task, accuracy
from examples.digits import Images, dense_size
from kfac_flat import FlatKFAC, NeuronPruner

# ---------------------------------------------------------------- policies

PLAIN, FLAT = "plain", "FlatKFAC"
READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("pace", "ranking", "normalize", "per"), str),
    "events": int,
    "max_share": float,
}
POLICIES = (
    PLAIN,
    "pace=cubic",
    "events=10",
    "normalize=mean",
    "normalize=max",
    "normalize=l2",
    "per=group",
    "per=mac",
    "per=parameter",
    "ranking=layer",
    "max_share=0.95",
    "pace=cubic+events=10",
    "pace=cubic+ranking=layer",
    "pace=cubic+events=10+ranking=layer",
)


@dataclass(frozen=True)
class Policy:
    """What differs from the plain policy; ``flat`` says whether the optimizer is FlatKFAC."""

    name: str
    flat: bool
    options: dict[str, Any]

    @classmethod
    def read(cls, name: str) -> Policy:
        """Read a policy such as ``FlatKFAC+pace=cubic``.

        Raises:
            ValueError: if there is no such option, or its value cannot be read.
        """
        parts = [] if name == PLAIN else name.split("+")
        options: dict[str, Any] = {"pace": "linear", "max_share": 1.0}
        for part in parts:
            option, _, value = part.partition("=")
            if option in READ:
                options[option] = READ[option](value)
            elif part != FLAT:
                raise ValueError(f"{part} is neither {FLAT} nor one of {', '.join(READ)} with a value")
        return cls(name, FLAT in parts, options)

    @property
    def reference(self) -> str:
        """The policy that it is compared with: the plain one under the same optimizer."""
        return FLAT if self.flat else PLAIN

    def schedule(self, task: Task, epochs: int) -> dict[str, int]:
        """Place the removals such that the last comes when the task has it, as many as fit before it."""
        events = self.options.get("events", 5)
        return task.removals(epochs, events, every=max(1, 10 // events))


# ---------------------------------------------------------------- tasks

TASKS = {
    "digits": replace(tasks.TASKS["digits"], seen=0.5),
    "cifar": Task(
        *(load_small_cifar, lambda: CifarNet((16, 16, 16, 32, 64), stride=2)),
        epochs=18,
        last=11,
        batch_size=128,
        seen=0.25,
    ),
}


# ---------------------------------------------------------------- one run


def run(
    task: Task, policy: Policy, level: float, seed: int, epochs: int, train_set: Images, test_set: Images
) -> Record:
    """Train one network, remove a share ``level`` of its neurons on the way, and say what came of it."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    model, example = task.network(), train_set.images[:1]
    optimizer = task.optimizer(model)
    if policy.flat:
        optimizer = FlatKFAC(optimizer, model)
    pruner = None
    if level:
        options = policy.options | policy.schedule(task, epochs)
        pruner = NeuronPruner(model, optimizer, example, target=level, **options)
    schedule = task.schedule(optimizer, epochs, train_set)

    start = time.perf_counter()
    for _ in range(epochs):
        for _ in task.epoch(model, optimizer, schedule, train_set, shuffle):
            pass
        if pruner:
            pruner.step()
    size = pruner.size if pruner else dense_size(model, example)[0]
    seconds = time.perf_counter() - start
    return {
        "accuracy": accuracy(model, test_set),
        "seconds": round(seconds, 2),
        **{name: value for name, value in asdict(size).items() if value is not None},
    }


# ---------------------------------------------------------------- all runs


IDENTITY = ("task", "policy", "level", "seed", "epochs")


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for name in options.tasks:
            for level in options.levels:
                for policy in options.policies if level else [PLAIN]:
                    epochs = options.epochs or TASKS[name].epochs
                    yield {"task": name, "policy": policy, "level": level, "seed": seed, "epochs": epochs}


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda name: TASKS[name].load(options.data_root))

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        task, policy, level, seed, epochs = identity(record, IDENTITY)
        return run(TASKS[task], Policy.read(policy), level, seed, epochs, *data(task))

    about = circumstances(options.command, options.threads)
    make_missing(planned(options), IDENTITY, lambda _: options.runs, make, about, console)


# ---------------------------------------------------------------- the report


def by_seed(records: Iterable[Record], **wanted: Any) -> dict[int, Record]:
    """Return the runs that are as wanted, by seed."""
    return {r["seed"]: r for r in records if all(r[name] == value for name, value in wanted.items())}


def standard_errors(differences: Sequence[float]) -> str:
    """Write by how many standard errors the mean differs from zero; nothing where that cannot be told."""
    if len(differences) < 2 or not stdev(differences):
        return ""
    return f"{mean(differences) / (stdev(differences) / len(differences) ** 0.5):+.1f}"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """Lay out one table per task, level and length of training, one row per policy."""
    for name, level, epochs in dict.fromkeys((r["task"], r["level"], r["epochs"]) for r in records):
        own = [r for r in records if (r["task"], r["level"], r["epochs"]) == (name, level, epochs)]
        removed = f"{level:.0%} of the neurons removed" if level else "dense"
        table = Table(box=SIMPLE_HEAD, title=f"{name}, {removed}, {epochs} epochs", title_justify="left")
        table.add_column("policy", no_wrap=True)
        for heading in ("accuracy %", "minus plain", "std. errors", "seeds", "neurons", "parameters", "MACs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for policy in dict.fromkeys(r["policy"] for r in own):
            table.add_row(*row(own, policy))
        yield table


def row(records: Sequence[Record], policy: str) -> list[str]:
    """Write what is known of a policy; differences are taken seed by seed."""
    runs, reference = by_seed(records, policy=policy), Policy.read(policy).reference
    others = {} if policy == reference else by_seed(records, policy=reference)
    differences = [runs[s]["accuracy"] - others[s]["accuracy"] for s in sorted(runs.keys() & others.keys())]
    sizes = [f"{mean(r[what] for r in runs.values()):,.0f}" for what in ("neurons", "parameters", "macs")]
    compared = [spread(differences, "{:+.2f}"), standard_errors(differences)] if differences else ["", ""]
    return [policy, spread([r["accuracy"] for r in runs.values()]), *compared, str(len(runs)), *sizes]


def report(options: argparse.Namespace, console: Console) -> None:
    """Print and write the tables of all runs that are there, with how these were made."""
    records = read_records(options.runs)
    if not records:
        raise SystemExit(f"{options.runs} holds no runs yet")
    write_tables(options.out / "table.txt", tables(records), notes(records), console)


def notes(records: Sequence[Record]) -> Iterator[str]:
    """Say how the numbers are to be read, and how they were made."""
    yield "accuracy after the last epoch, mean ± standard deviation over seeds; minus plain: paired by seed, against"
    yield "the plain policy under the same optimizer; std. errors: that difference over its standard error"
    yield from how_made(records)


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
    parser = Parser("policy", "Compare NeuronPruner's options by the accuracy that is left, one change at a time.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train on")
    parser.add_argument("--levels", nargs="+", type=share, default=[0.75, 0.9], metavar="SHARE", help="neurons to go")
    parser.add_shared("--seeds", default=list(range(5)))
    parser.add_argument("--policies", nargs="+", type=_policy, default=POLICIES, metavar="POLICY", help="see above")
    parser.add_shared("--epochs")
    parser.add_shared("--data-root", help="folder with cifar-10-batches-py/, as torchvision reads it")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("benchmarks/results/policy"))
    parser.add_argument("--report", action="store_true", help="lay out the runs that are there, and run nothing")
    options = parser.read(arguments)
    options.runs = options.out / "runs.jsonl"
    return options


def _policy(text: str) -> str:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    try:
        NeuronPruner(model, SGD(model.parameters()), torch.ones(1, 2), target=0.5, **Policy.read(text).options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    main()
