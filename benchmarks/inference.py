"""How long networks take that have lost neurons, or as many parameters as zeros: the paper's Table 2, measured.

Three networks are trained as :mod:`benchmarks.accuracy` does, from the same weights: one stays dense, one loses neurons
by HGNP, in one the smallest weights are set to zero, as many as go where each layer loses that share of its neurons.
Then calls in eval mode are timed on the device, the networks in turn at every batch size, several times over, so that
what else the machine does meets all three. Zeros are multiplied like other numbers: tensors stay dense.

Each comparison adds a line to ``TASK.jsonl``; those that are there already are not repeated. Run it with ``python -m
benchmarks.inference --task digits`` (``pip install -e ".[benchmark,examples]"``); ``--help`` tells the options. The
table is in :mod:`benchmarks.paper`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.accuracy import loaded
from benchmarks.commands import Parser, begin, share
from benchmarks.methods import METHODS
from benchmarks.records import (
    Record,
    circumstances,
    hardware,
    identity,
    in_file_of_task,
    make_missing,
)
from benchmarks.sizes import measured
from benchmarks.tasks import TASKS, Task, accuracy
from benchmarks.training import Training, train
from examples.digits import Images, whole
from kfac_flat.pruning.latency import latency
from kfac_flat.pruning.tracing import ExampleInputs

RESULTS = Path("benchmarks/results/inference")
NETWORKS = {"full": "sgd", "neurons": "hgnp", "weights": "weight-magnitude"}  # by the methods that make them
SETTING = ("task", "sparsity", "epochs", "batch_sizes", "hardware", "threads")
IDENTITY = (*SETTING, "seed")

# ---------------------------------------------------------------- one comparison


def compare(
    task: Task,
    sparsity: float,
    seed: int,
    epochs: int,
    data: tuple[Images, Images],
    batch_sizes: Sequence[int],
    repetitions: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Record:
    """Train the three networks, and time their calls."""
    trained = {
        name: train(Training(task, METHODS[method], 0.0 if name == "full" else sparsity, seed, epochs), data, on_epoch)
        for name, method in NETWORKS.items()
    }
    networks, test_set = {name: one.model for name, one in trained.items()}, data[1]
    times = timed(networks, test_set.images, batch_sizes, repetitions)
    found = {
        name: {
            "accuracy": accuracy(model, test_set),
            "macs": measured(model, test_set.images[:1])[0].macs,
            "parameters": sum(p.numel() for p in model.parameters()),
            "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
            "latencies": times[name],
        }
        for name, model in networks.items()
    }
    return {
        "accuracy": found["neurons"]["accuracy"],
        "seconds": round(sum(one.seconds for one in trained.values()), 2),
        "networks": found,
    }


def timed(
    networks: Mapping[str, nn.Module], images: Tensor, batch_sizes: Sequence[int], repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """Return the median seconds of a call by network and batch size, once for each time that all had their turn."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    for size in batch_sizes:
        inputs = ExampleInputs.of(images[:size])
        for _ in range(repetitions):
            for name, model in networks.items():
                times[name].setdefault(str(size), []).append(latency(model, inputs))
    return times


# ---------------------------------------------------------------- all comparisons


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the comparisons asked for."""
    for seed in options.seeds:
        for task in options.task:
            for sparsity in options.sparsity:
                yield {
                    "task": task,
                    "sparsity": sparsity,
                    "seed": seed,
                    "epochs": options.epochs or TASKS[task].epochs,
                    "batch_sizes": " ".join(map(str, options.batch_size)),
                    "hardware": hardware(torch.device(options.device)),
                    "threads": options.threads,
                }


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the comparisons that are missing."""
    data = cache(lambda name: loaded(TASKS[name], options.data_root, options.device))

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        name, sparsity, epochs, seed = identity(record, ("task", "sparsity", "epochs", "seed"))
        there = len(data(name)[1].labels)
        if max(options.batch_size) > there:
            raise SystemExit(f"{name} has {there} test images: give --batch-size no larger than that")
        return compare(
            *(TASKS[name], sparsity, seed, epochs, data(name), options.batch_size, options.repetitions),
            on_epoch=lambda: advance(1 / (len(NETWORKS) * epochs)),
        )

    about = circumstances(options.command, options.threads, options.device, ("torch", "torchvision"))
    make_missing(planned(options), IDENTITY, in_file_of_task(options.out), make, about, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    run_all(options, begin(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser(
        "inference", "Time networks that are whole, that lost neurons, and that lost as many parameters as zeros."
    )
    tasks = [name for name, task in TASKS.items() if not task.pretrained]
    parser.add_argument("--task", nargs="+", choices=tasks, default=["digits"], help="what to train on")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0.75], metavar="SHARE", help="of neurons")
    parser.add_argument(
        "--batch-size", nargs="+", type=whole(1), default=[1, 16, 256], metavar="N", help="images a call"
    )
    parser.add_argument("--repetitions", type=whole(1), default=5, help="turns of each network at each batch size")
    parser.add_shared("--seeds", default=[0], help="of the trainings")
    parser.add_shared("--epochs")
    parser.add_shared("--data-root")
    parser.add_shared("--device")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    options = parser.read(arguments)
    if not all(options.sparsity):
        parser.error("--sparsity 0 is the full network, which is always there")
    return options


if __name__ == "__main__":
    main()
