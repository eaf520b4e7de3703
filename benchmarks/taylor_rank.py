"""How well criteria rank neurons: Spearman's correlation with what removing each neuron alone does to the loss.

The measure of Molchanov et al. [arXiv 1611.06440, section 3.2], who report .73 for their criterion, VGG-16 and Birds. A
network is trained as in :mod:`benchmarks.tasks`, once per seed. Then, in eval mode and in float64, each group of
neurons is removed by itself, and the change of the mean loss on some training images is taken down. On the same images,
in eval mode and without moving a weight, all criteria score the groups. A criterion's ranking is compared with that by
the absolute change, and with that by the change itself, which knows neurons that do harm: over all layers at once, and
within each layer.

Each seed adds a line to ``TASK.jsonl``; those that are there already are not repeated. ``TASK.txt`` has the means. Run
it with ``python -m benchmarks.taylor_rank --task digits`` (``pip install -e ".[benchmark,examples]"``); ``--help``
tells the options.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD

from baselines import GateTaylorPruner, MagnitudePruner, RandomPruner, TaylorPruner
from benchmarks.commands import Parser, begin
from benchmarks.records import (
    Record,
    append,
    circumstances,
    how_made,
    one_line,
    progress_bar,
    read_records,
    spread,
    write_tables,
)
from benchmarks.tasks import CRITERION, TASKS, Task, accuracy
from examples.digits import Images, whole
from kfac_flat import NeuronPruner
from kfac_flat.pruning.layers import weight_of

CRITERIA: dict[str, tuple[type[NeuronPruner], dict[str, Any]]] = {
    "taylor": (TaylorPruner, {"normalize": None}),
    "taylor, l2 per layer": (TaylorPruner, {"normalize": "l2"}),
    "taylor 2019": (GateTaylorPruner, {}),
    "theta": (NeuronPruner, {}),
    "magnitude l2": (MagnitudePruner, {"order": 2}),
    "random": (RandomPruner, {}),
}
ORACLES = {"absolute change": Tensor.abs, "change": Tensor.clone}
ALL = "all layers"
BATCH = 64  # of the images that are read: Theta and Taylor's of 2019 go by the gradients of batches

# ---------------------------------------------------------------- ranks


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ascending; equals share the mean of theirs. ``[n]``."""
    below, equal = values[:, None] > values, values[:, None] == values
    return below.sum(1) + (equal.sum(1) + 1) / 2


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers, ``[n]`` each; nan where all of one are equal."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]).double())[0, 1])


# ---------------------------------------------------------------- what is compared


def loss_changes(model: nn.Module, reads: Mapping[str, Tensor], groups: Tensor, data: Images) -> Tensor:
    """Change of the mean loss when each group of neurons goes alone.

    Args:
        model: As it is used, in eval mode.
        reads: Which group each input of a layer belongs to, for the layers that read any, by name.
        groups: Numbers of the groups.
        data: Images and labels on which the loss is measured.

    Returns:
        ``[groups]``, float64.
    """
    model = copy.deepcopy(model).double().eval()
    weights = {name: weight_of(model.get_submodule(name)) for name in reads}
    batches = list(zip(data.images.double().split(BATCH), data.labels.split(BATCH), strict=True))

    def loss() -> float:
        return sum(len(y) * float(CRITERION(model(x), y)) for x, y in batches) / len(data.labels)

    with torch.inference_mode():
        dense, changes = loss(), []
        for group in groups:
            read = {name: ids == group for name, ids in reads.items() if (ids == group).any()}
            with unread(weights, read):
                changes.append(loss() - dense)
    return torch.tensor(changes, dtype=torch.float64)


@contextmanager
def unread(weights: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the weights to zero that read the inputs marked, ``[C_in]`` bool, and put them back."""
    kept = {name: weights[name].detach()[:, marked] for name, marked in read.items()}
    for name, marked in read.items():
        weights[name].detach()[:, marked] = 0
    yield
    for name, marked in read.items():
        weights[name].detach()[:, marked] = kept[name]


def scored(model: nn.Module, kind: type[NeuronPruner], options: Mapping[str, Any], data: Images) -> NeuronPruner:
    """Return a pruner that has scored a copy of a trained network on these images."""
    model = copy.deepcopy(model).eval()
    still = SGD(model.parameters(), lr=0.0)
    pruner = kind(model, still, data.images[:1], target=0.01, start=1, events=1, **options)
    for images, labels in zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True):
        still.zero_grad()
        CRITERION(model(images), labels).backward()
        still.step()
    return pruner


def correlations(model: nn.Module, data: Images) -> dict[str, dict[str, dict[str, float]]]:
    """Return Spearman's correlation by oracle, criterion, and layer; :data:`ALL` for all at once."""
    pruners = {name: scored(model, kind, options, data) for name, (kind, options) in CRITERIA.items()}
    one = pruners["theta"]  # all number the groups alike
    reads = {name: one._channels[name].inputs for name in one._graph.consumers}
    changes = loss_changes(model, reads, one._groups.ids, data)
    parts = {", ".join(kind.members): kind.groups for kind in one._groups.kinds}
    parts[ALL] = torch.arange(len(changes))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for oracle, of in ORACLES.items():
        for name, pruner in pruners.items():
            scores, truth = torch.tensor(pruner._scores(), dtype=torch.float64), of(changes)
            of_parts = {part: spearman(scores[places], truth[places]) for part, places in parts.items()}
            found.setdefault(oracle, {})[name] = of_parts
    return found


def trained(task: Task, epochs: int, seed: int, train_set: Images) -> nn.Module:
    """Train a network with the task's own optimizer."""
    torch.manual_seed(seed)
    model, shuffle = task.network(), torch.Generator().manual_seed(seed)
    optimizer = task.optimizer(model)
    schedule = task.schedule(optimizer, epochs, train_set)
    for _ in range(epochs):
        for _ in task.epoch(model, optimizer, schedule, train_set, shuffle):
            pass
    return model


# ---------------------------------------------------------------- results


def table(runs: Sequence[Record]) -> Table:
    """Lay out means and standard deviations over the seeds."""
    laid_out = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    first = runs[0]["correlations"]
    layers = [part for part in next(iter(first["change"].values())) if part != ALL]
    for heading in ("ranked by", "criterion"):
        laid_out.add_column(heading, no_wrap=True)
    for heading in (ALL, "mean of layers", *(layer.replace(", ", "\n") for layer in layers)):
        laid_out.add_column(heading, justify="right", no_wrap=True)
    for oracle, criteria in first.items():
        for criterion in criteria:
            own = [run["correlations"][oracle][criterion] for run in runs]
            means = [mean(one[layer] for layer in layers) for one in own]
            columns = ([one[ALL] for one in own], means, *([one[layer] for one in own] for layer in layers))
            laid_out.add_row(oracle, criterion, *map(spread, columns))
    return laid_out


def run(task: Task, epochs: int, seed: int, images: int, data: tuple[Images, Images]) -> Record:
    """Train a network, and compare all criteria on it."""
    start = time.perf_counter()
    train_set, test_set = data
    model = trained(task, epochs, seed, train_set)
    found = correlations(model, Images(train_set.images[:images], train_set.labels[:images]))
    seconds = round(time.perf_counter() - start, 1)
    return {"accuracy": accuracy(model, test_set), "seconds": seconds, "correlations": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options, width=240)
    task, results = replace(TASKS[options.task], seen=options.seen), options.out / f"{options.task}.jsonl"
    setting = {"epochs": options.epochs or task.epochs, "seen": options.seen, "images": options.images}

    def alike() -> list[Record]:
        return [record for record in read_records(results) if setting.items() <= record.items()]

    missing = [seed for seed in options.seeds if seed not in {record["seed"] for record in alike()}]
    about = circumstances(options.command, options.threads, packages=("torch", "torchvision"))
    with progress_bar(console) as progress:
        for seed in progress.track(missing, description=options.task):
            found = run(task, setting["epochs"], seed, options.images, task.load(options.data_root))
            append(results, {"task": options.task, "seed": seed, **setting, **found, **about})
    runs = alike()
    notes = [
        f"{options.task}, {one_line(setting)}: Spearman's correlation, mean ± standard deviation over the seeds",
        f"test accuracy: {spread([run['accuracy'] for run in runs])} %",
        *how_made(runs),
    ]
    write_tables(results.with_suffix(".txt"), [table(runs)], notes, console, width=240)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("taylor_rank", "Compare criteria with the exact change of the loss when a neuron goes.")
    parser.add_argument("--task", choices=TASKS, default="digits", help="what to train on")
    parser.add_shared("--seeds", default=[0, 1, 2])
    parser.add_shared("--epochs")
    parser.add_argument("--seen", type=float, default=1.0, help="share of the training images in an epoch")
    parser.add_argument("--images", type=whole(2), default=512, help="training images on which the loss is measured")
    parser.add_shared("--data-root", help="folder with MNIST/ or cifar-10-batches-py/, as of torchvision")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("benchmarks/results/taylor_rank"))
    return parser.read(arguments)


if __name__ == "__main__":
    main()
