"""Whether rho is what it stands for: beside the true curvature, and beside the length of the weights, while training.

Every run trains a network from scratch as in :mod:`benchmarks.defaults` and stops about eight times on the way to
measure, in training mode and on the same images each time: rho of each layer, from one random combination of the
labels' gradients per image as the penalty has it and from all labels with their probabilities; the top eigenvalue of
the Gauss-Newton matrix (GGN) and of the Hessian, of all parameters and of each layer's weight alone; the length of the
weights, the learning rate, and the sharpness for changes relative to the weights.

Each run adds a line to ``TASK.jsonl``; runs that are there already are not repeated. Run it with
``python -m benchmarks.curvature`` (``pip install -e ".[benchmark,examples]"``); ``--help`` tells the options,
``--report`` writes a page with pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import kfac_flat
from benchmarks import curvature_page
from benchmarks.accuracy import sharpness
from benchmarks.commands import Parser, begin
from benchmarks.defaults import SGD, SMALL_TASKS, known_setting, optimizer_of
from benchmarks.hessian import TrueCurvature, largest_eigenvalue
from benchmarks.records import (
    Record,
    circumstances,
    identity,
    in_file_of_task,
    make_missing,
    read_records,
)
from benchmarks.report import write_page
from benchmarks.tasks import Task, accuracy
from examples.digits import Images

RESULTS = Path("benchmarks/results/curvature")
PAGE = Path("docs/results/curvature.md")
MEASURED = 32  # images: as many as the penalty sees of a batch of digits
STOPS = 8  # at least, where there are as many epochs
# By default, harder, and as recommended for flat minima.
SETTINGS = (SGD, "default", "mu=0.1", "mu=0.03+fisher=empirical+every=1")
TASKS = {name: replace(SMALL_TASKS[name], epochs=epochs) for name, epochs in (("digits", 16), ("mnist-lenet5", 12))}

# ---------------------------------------------------------------- one run


def run(task: Task, setting: str, seed: int, epochs: int, data: tuple[Images, Images]) -> Record:
    """Train one network, and say what was measured on the way."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    train_set, test_set = data
    model = task.network()
    optimizer = optimizer_of(setting)(task.optimizer(model), model)
    schedule = task.schedule(optimizer, epochs, train_set)
    curvature = Measurement(task, Images(train_set.images[:MEASURED], train_set.labels[:MEASURED]))
    invariant = curvature.invariant(model)

    found, start = [], time.perf_counter()
    for epoch in range(epochs + 1):
        if epoch % (epochs // STOPS or 1) == 0:
            found.append({"epoch": epoch, "lr": schedule.get_last_lr()[0], **curvature(model)})
        if epoch < epochs:
            for _ in task.epoch(model, optimizer, schedule, train_set, shuffle):
                pass
    seconds = round(time.perf_counter() - start, 2)
    return {"invariant": invariant, "measured": found, "accuracy": accuracy(model, test_set), "seconds": seconds}


class Measurement:
    """Measures the curvature of networks at a batch, on copies of them.

    Args:
        task: Makes the copies.
        batch: Images and labels.
    """

    def __init__(self, task: Task, batch: Images) -> None:
        self._task, self._batch = task, batch
        self._eigenvectors: dict[tuple[str, str], Tensor] = {}  # where the next search starts

    def __call__(self, model: nn.Module) -> Record:
        """Return what there is of the whole network, and of each layer by name."""
        copy, images, labels = self._copy(model), self._batch.images, self._batch.labels
        sampled = kfac_flat.spectral_radii(copy, images, exact=True)
        expected = expected_radii(copy, images)
        curvature = TrueCurvature(copy, images, labels)
        weights = {name: copy.get_submodule(name).weight for name in sampled}
        layers = {
            name: {
                "rho": sampled[name],
                "expected_rho": expected[name],
                **self._top_eigenvalues(curvature, name, [weight]),
                "squared_norm": float(weight.detach().square().sum()),
            }
            for name, weight in weights.items()
        }
        tops = self._top_eigenvalues(curvature, "", list(copy.parameters()))
        return {**tops, "layers": layers, "sharpness": sharpness(self._copy(model), images, labels)}

    def _top_eigenvalues(self, curvature: TrueCurvature, name: str, parameters: list[nn.Parameter]) -> dict[str, float]:
        """Find those of GGN and Hessian with respect to the parameters, from where the last search ended."""
        values = {}
        for kind, product in (("ggn", curvature.ggn), ("hessian", curvature.hessian)):
            random = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
            start = self._eigenvectors.get((kind, name), 0) + 0.1 * random / random.norm()  # never orthogonal to it
            values[kind], self._eigenvectors[kind, name] = largest_eigenvalue(product(parameters), start)
        return values

    def invariant(self, model: nn.Module) -> list[str]:
        """Name the layers whose weight may be doubled without a change of the output: BatchNorm takes it out."""
        copy, images = self._copy(model), self._batch.images
        names = []
        with torch.no_grad():
            output = copy(images)
            for name, layer in copy.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    layer.weight.mul_(2)
                    if torch.allclose(copy(images), output, rtol=0, atol=0.01 * float(output.std())):
                        names.append(name)
                    layer.weight.div_(2)
        return names

    def _copy(self, model: nn.Module) -> nn.Module:
        """Make one in training mode, without hooks, whose BatchNorm statistics are its own."""
        copy = self._task.network()
        copy.load_state_dict(model.state_dict())
        return copy.train()


def expected_radii(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Measure rho of each layer with the labels' probabilities instead of one random combination of them.

    The Hessian of the cross entropy at the logits is the sum of p_k (p - e_k) (p - e_k)^T over the K classes. So each
    image comes K times, the k-th time with sqrt(K p_k) (p - e_k) for its gradient at the logits.
    """

    def all_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
        p = logits.detach().softmax(1)
        example, classes = torch.arange(len(p)), p.shape[1]
        label = example % classes
        gradient = p.clone()
        gradient[example, label] -= 1
        return (classes * p[example, label]).sqrt() * (gradient * logits).sum(1)

    with torch.no_grad():
        classes = model(images[:2]).shape[1]
    return kfac_flat.spectral_radii(model, images.repeat_interleave(classes, 0), likelihood=all_labels, exact=True)


# ---------------------------------------------------------------- all runs


IDENTITY = ("task", "setting", "seed", "epochs")


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for task in options.tasks:
            for setting in options.settings:
                epochs = options.epochs or TASKS[task].epochs
                yield {"task": task, "setting": setting, "seed": seed, "epochs": epochs}


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda name: TASKS[name].load(options.data_root))

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        task, setting, seed, epochs = identity(record, IDENTITY)
        return run(TASKS[task], setting, seed, epochs, data(task))

    about = circumstances(options.command, options.threads)
    make_missing(planned(options), IDENTITY, in_file_of_task(options.out), make, about, console)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    if options.report:
        records = [r for task in TASKS for r in read_records(options.out / f"{task}.jsonl")]
        if not records:
            raise SystemExit(f"there are no runs in {options.out}")
        write_page(options.page, partial(curvature_page.lines, records))
    else:
        run_all(options, begin(options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser(
        "curvature", "Compare rho with the true curvature, and with the length of the weights, along training runs."
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train on")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=known_setting,
        default=list(SETTINGS),
        metavar="SETTING",
        help="of FlatKFAC, or sgd",
    )
    parser.add_shared("--seeds", default=[0, 1, 2])
    parser.add_shared("--epochs")
    parser.add_shared("--data-root", help="folder with MNIST/, as of torchvision")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE, help="what --report writes, pictures beside it")
    parser.add_argument("--report", action="store_true", help="write the page of the runs there are, and run nothing")
    return parser.read(arguments)


if __name__ == "__main__":
    main()
