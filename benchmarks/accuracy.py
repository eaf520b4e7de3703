"""How much accuracy is left at which sparsity, method by method: the race.

Every run trains a network from scratch and removes a share of its neurons on the way, or of its multiply-accumulates
(``--budget macs``, ``--speedup``), by one of the methods in :mod:`benchmarks.methods` on one of the tasks in
:mod:`benchmarks.tasks`. With the same seed, all methods start from the same weights and see the same batches, and all
have the same epochs in all. Sparsity 0 is the dense network, as the method's optimizer trains it. Methods that remove
no neurons lose as many parameters instead, see there.

Each run adds a line to ``TASK.jsonl`` in the folder of results: the accuracy after the last epoch, never the best, what
is left of the network and how fast it is, how much less went than was asked for, how flat the minimum is, and how all
this was made. Runs that are there already are not repeated, so the command can be stopped and given again, with more to
do if you like.

Run it with ``python -m benchmarks.accuracy --task digits --method hgnp taylor --sparsity 0.5 0.75 --seeds 0 1 2``
(``pip install -e ".[benchmark,examples]"``); ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import kfac_flat
from benchmarks.commands import Parser, begin, share
from benchmarks.execution import AMP, Execution
from benchmarks.methods import METHODS
from benchmarks.noise import disturbed
from benchmarks.pretrained import Weights, starting_from
from benchmarks.records import Record, circumstances, identity, in_file_of_task, make_missing
from benchmarks.sizes import measured
from benchmarks.tasks import TASKS, Task, accuracy
from benchmarks.training import BUDGETS, Training, train
from examples.digits import Images
from kfac_flat.pruning.latency import latency
from kfac_flat.pruning.tracing import ExampleInputs

RESULTS = Path("benchmarks/results/accuracy")
TOLERATED = 0.01  # share by which a method may miss what it was asked to remove
MEASURED = 256  # images on which latency, rho and sharpness are measured

# ---------------------------------------------------------------- one run


def run(training: Training, data: tuple[Images, Images], on_epoch: Callable[[], None] = lambda: None) -> Record:
    """Train one network, remove a share of the budget on the way, and say what came of it; see :func:`train`."""
    trained = train(training, data, on_epoch)
    model, (train_set, test_set) = trained.model, data
    size, widths = measured(model, train_set.images[:1])
    return {
        "accuracy": accuracy(model, test_set),
        "seconds": trained.seconds,
        "missed": trained.missed,
        "neurons": size.neurons,
        "parameters": size.parameters,
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "macs": size.macs,
        "latency": latency(model, ExampleInputs.of(test_set.images[:MEASURED])),
        "rho": max(kfac_flat.spectral_radii(model.eval(), test_set.images[:MEASURED]).values()),
        "sharpness": sharpness(model, train_set.images[:MEASURED], train_set.labels[:MEASURED]),
        "widths": widths,
    }


def sharpness(model: nn.Module, images: Tensor, labels: Tensor, noise: float = 0.1, draws: int = 20) -> float:
    """Mean rise of the loss in eval mode when every weight is multiplied by 1 plus normal noise, for weights of layers.

    It stays the same when weights are scaled without a change of the function, such as those in front of a ReLU against
    those behind it [average-case adaptive sharpness, Andriushchenko et al., arXiv 2302.07011].

    Args:
        model: Switched to eval mode.
        images: ``[N, ...]``.
        labels: ``[N]``.
        noise: Its standard deviation.
        draws: Number of times it is drawn; always the same noise for the same network.
    """
    model.eval()

    def loss(weights: Mapping[str, Tensor]) -> float:
        return float(F.cross_entropy(functional_call(model, dict(weights), (images,)), labels))

    with torch.inference_mode():
        plain = loss({})
        rises = [loss(weights) - plain for weights in disturbed(model, noise, draws)]
    return sum(rises) / draws


# ---------------------------------------------------------------- all runs


IDENTITY = ("task", "method", "sparsity", "seed", "epochs", "budget", "amp", "pretrained")


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for task in options.task:
            for sparsity in options.sparsity:
                for method in options.method:
                    yield {
                        "task": task,
                        "method": method,
                        "sparsity": sparsity,
                        "seed": seed,
                        "epochs": options.epochs or TASKS[task].epochs,
                        "budget": options.budget if sparsity else "neurons",  # a dense network is one of every budget
                        "amp": options.amp,
                        "pretrained": options.pretrained.fingerprint if TASKS[task].pretrained else None,
                    }


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda name: loaded(TASKS[name], options.data_root, options.device))
    execution = Execution(options.amp, options.compile, options.channels_last)

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        name, method, sparsity, seed, epochs, budget, *_ = identity(record, IDENTITY)
        task = starting_from(TASKS[name], options.pretrained) if TASKS[name].pretrained else TASKS[name]
        training = Training(task, METHODS[method], sparsity, seed, epochs, budget, execution)
        return run(training, data(name), lambda: advance(1 / epochs))

    about = circumstances(options.command, options.threads, options.device, ("torch", "torchvision"))
    make_missing(
        *(planned(options), IDENTITY, in_file_of_task(options.out), make, about, console),
        notes=lambda found: (
            f", {found['missed']:.1%} less removed than asked for" if found["missed"] > TOLERATED else ""
        ),
    )


def loaded(task: Task, root: Path | None, device: str) -> tuple[Images, Images]:
    """Load a task's images, and keep them where they are used."""
    train, test = (Images(part.images.to(device), part.labels.to(device)) for part in task.load(root))
    return train, test


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    run_all(options, begin(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("accuracy", "Compare methods by the accuracy that is left at given sparsities.")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["digits"], help="what to train on")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["hgnp", "taylor"], help="how")
    amounts = parser.add_mutually_exclusive_group()
    amounts.add_argument(
        "--sparsity", nargs="+", type=share, default=[0.5, 0.75], metavar="SHARE", help="of the budget to remove"
    )
    amounts.add_argument(
        "--speedup", nargs="+", type=speedup, metavar="TIMES", help="fewer MACs, instead of a share with --budget macs"
    )
    parser.add_argument("--budget", choices=BUDGETS, default="neurons", help="what --sparsity is a share of")
    parser.add_shared("--seeds", default=[0, 1, 2])
    parser.add_shared("--epochs")
    parser.add_shared("--data-root", help="folder with MNIST/ or cifar-10-batches-py/, as of torchvision")
    parser.add_argument(
        "--pretrained", type=Weights.read, metavar="FILE", help="state dict that tasks -pretrained start from"
    )
    parser.add_shared("--device")
    parser.add_argument("--amp", choices=AMP, help="type that autocast uses in training")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile training before and after removals",
    )
    parser.add_argument("--channels-last", action="store_true", help="lay weights of convolutions out that way")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    options = parser.read(arguments)
    if options.speedup:
        options.sparsity, options.budget = options.speedup, "macs"
    dense = [name for name in options.method if METHODS[name].pruner is None]
    if dense and any(options.sparsity):
        parser.error(f"--method {' '.join(dense)} removes no neurons: give --sparsity 0")
    check_pretrained(parser, options)
    return options


def check_pretrained(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """See that weights are given where they are used, and fit."""
    starting = [name for name in options.task if TASKS[name].pretrained]
    if bool(starting) != bool(options.pretrained):
        parser.error("--pretrained FILE and tasks named -pretrained go together")
    for name in starting:
        try:
            starting_from(TASKS[name], options.pretrained)
        except ValueError as error:
            parser.error(f"--pretrained for {name}: {error}")


def speedup(text: str) -> float:
    """Read how many times fewer multiply-accumulates there are to be, as the share to remove."""
    times = float(text)
    if not 1 <= times < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return 1 - 1 / times


if __name__ == "__main__":
    main()
