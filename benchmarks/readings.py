"""How many of an epoch's steps Theta has to be read at: rankings by some steps beside the ranking by all.

A network is trained as in :mod:`benchmarks.tasks`, nothing is removed, and Theta is read at every optimizer step. For
each epoch and each number of readings, the mean over that many steps, chosen as :class:`NeuronPruner` chooses them, is
compared with the mean over all: by Spearman's correlation, and by the share that the lower halves have in common. What
these mean, three other pairs tell: odd against even steps, an epoch against the one before it, and one single step
against all.

Each seed adds a line to ``TASK.jsonl``; those that are there already are not repeated. ``TASK.txt`` has the means over
seeds and epochs. Run it with ``python -m benchmarks.readings --task digits`` (``pip install -e
".[benchmark,examples]"``); ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.commands import Parser, begin
from benchmarks.methods import METHODS
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
from benchmarks.tasks import TASKS, Task, accuracy
from benchmarks.taylor_rank import spearman
from examples.digits import Images
from kfac_flat import NeuronPruner
from kfac_flat.pruning.readings import Readings

RESULTS = Path("benchmarks/results/readings")
READINGS = (1, 4, 8, 16, 32, 64)
IDENTITY = ("task", "method", "seed", "epochs")


def agreement(some: Tensor, others: Tensor) -> dict[str, float]:
    """Compare two scores of the same groups, ``[groups]`` each."""
    half = len(some) // 2
    lower = set(some.argsort()[:half].tolist()) & set(others.argsort()[:half].tolist())
    return {"spearman": spearman(some, others), "lower half": len(lower) / half}


def chosen(count: int, steps: int) -> Tensor:
    """Return the steps that are read in an epoch of this many, the one before having had as many."""
    readings = Readings(count, before=steps)
    return torch.tensor([step for step in range(steps) if readings.next()])


def of_epoch(thetas: Tensor, before: Tensor | None) -> dict[str, dict[str, float]]:
    """Compare what is read at some of an epoch's steps with what is read at all.

    Args:
        thetas: Theta of each step, ``[steps, groups]``.
        before: Mean of the epoch before, ``[groups]``.
    """
    full = thetas.mean(0)
    found = {str(count): agreement(thetas[chosen(count, len(thetas))].mean(0), full) for count in READINGS}
    found["odd against even"] = agreement(thetas[::2].mean(0), thetas[1::2].mean(0))
    if before is not None:
        found["epoch before"] = agreement(before, full)
    return found


def run(
    task: Task, method: str, epochs: int, seed: int, data: tuple[Images, Images], on_epoch: Callable[[], None]
) -> Record:
    """Train a network, and compare in each epoch."""
    start, train_set = time.perf_counter(), data[0]
    torch.manual_seed(seed)
    model, shuffle = task.network(), torch.Generator().manual_seed(seed)
    optimizer = METHODS[method].optimizer(task.optimizer(model), model)
    pruner = NeuronPruner(model, optimizer, train_set.images[:1], target=0.5, readings=None)
    sums: list[Tensor] = [pruner._saliency.total.clone()]

    def take_down(stepped: Optimizer, args: object, kwargs: object) -> None:
        sums.append(pruner._saliency.total.clone())

    optimizer.register_step_post_hook(take_down)
    schedule, found, before = task.schedule(optimizer, epochs, train_set), [], None
    for _ in range(epochs):
        for _ in task.epoch(model, optimizer, schedule, train_set, shuffle):
            pass
        thetas = torch.stack(sums).double().diff(dim=0)
        found.append(of_epoch(thetas, before))
        before, sums = thetas.mean(0), sums[-1:]
        on_epoch()
    seconds = round(time.perf_counter() - start, 1)
    return {"accuracy": accuracy(model, data[1]), "seconds": seconds, "steps": len(thetas), "agreement": found}


def table(runs: Sequence[Record]) -> Table:
    """Lay out means and standard deviations over seeds and epochs."""
    laid_out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    laid_out.add_column(f"of {runs[0]['steps']} steps", no_wrap=True)
    for heading in ("Spearman", "lower half in common", "worst of all epochs"):
        laid_out.add_column(heading, justify="right", no_wrap=True)
    for pair in runs[0]["agreement"][-1]:
        both = [epoch[pair] for run in runs for epoch in run["agreement"] if pair in epoch]
        rank, half = ([one[what] for one in both] for what in ("spearman", "lower half"))
        laid_out.add_row(pair, spread(rank, "{:.3f}"), spread(half, "{:.3f}"), f"{min(half):.3f}")
    return laid_out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    task = TASKS[options.task]
    data, epochs = task.load(options.data_root), options.epochs or task.epochs
    planned = [
        {"task": options.task, "method": options.method, "seed": seed, "epochs": epochs} for seed in options.seeds
    ]

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        return run(task, record["method"], epochs, record["seed"], data, lambda: advance(1 / epochs))

    about = circumstances(options.command, options.threads)
    file_of = in_file_of_task(options.out)
    make_missing(planned, IDENTITY, file_of, make, about, console)
    asked = {identity(record, IDENTITY) for record in planned}
    runs = [record for record in read_records(file_of(planned[0])) if identity(record, IDENTITY) in asked]
    lines = [f"mean accuracy {mean(r['accuracy'] for r in runs):.2f} %", *how_made(runs)]
    write_tables(options.out / f"{options.task}.txt", [table(runs)], lines, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("readings", "Compare rankings of neurons by some of an epoch's steps with that by all.")
    parser.add_argument("--task", choices=TASKS, default="digits", help="what to train on")
    parser.add_argument("--method", choices=("theta", "hgnp"), default="theta", help="without or with the penalty")
    parser.add_shared("--seeds", default=[0, 1, 2])
    parser.add_shared("--epochs")
    parser.add_shared("--data-root", help="folder with MNIST/ or cifar-10-batches-py/, as of torchvision")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    return parser.read(arguments)


if __name__ == "__main__":
    main()
