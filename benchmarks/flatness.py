"""How flat are the minima that methods end in: curvature, and accuracy when weights are disturbed, after the same runs.

Trains as :mod:`benchmarks.accuracy` does and measures at the end of training, in eval mode:

- rho, the spectral radius of the K-FAC curvature, on test images;
- the top eigenvalue of the Hessian of the training loss, with respect to all parameters;
- the same with respect to relative changes of the layers' weights: of ``diag(w) H diag(w)``. It stays the same when
  weights are scaled without a change of the function, as BatchNorm and ReLU let them be; the two above do not;
- test accuracy when every weight of the layers is multiplied by 1 plus normal noise.

Each run adds a line to ``TASK.jsonl``; runs that are there already are not repeated. Run it with ``python -m
benchmarks.flatness`` (``pip install -e ".[benchmark,examples]"``); ``--help`` tells the options, ``--report`` writes
``docs/results/flatness.md`` from the runs there are.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import kfac_flat
from benchmarks.accuracy import MEASURED, loaded, sharpness
from benchmarks.commands import Parser, begin, share
from benchmarks.hessian import Product, TrueCurvature, largest_eigenvalue
from benchmarks.methods import METHODS
from benchmarks.noise import disturbed
from benchmarks.records import (
    Record,
    circumstances,
    how_made,
    identity,
    in_file_of_task,
    make_missing,
    read_records,
    spread,
)
from benchmarks.report import table, write_page
from benchmarks.sizes import measured
from benchmarks.tasks import TASKS, accuracy
from benchmarks.training import Trained, Training, train
from examples.digits import Images

RESULTS = Path("benchmarks/results/flatness")
LABELS = {
    "hgnp": "HGNP",
    "hgnp-flat": "HGNP at every step",
    "hgnp-flat-sixteenth": "HGNP at every step, a sixteenth of the batch",
    "hgnp-every-step": "HGNP at every step, own labels",
    "theta": "SGD",
    "sam": "SAM",
    "spectral-radius": "spectral radius of the Hessian",
}
NOISES = (0.1, 0.2, 0.3, 0.4)  # standard deviations
DRAWS = 20
IDENTITY = ("task", "method", "sparsity", "seed", "epochs")

# ---------------------------------------------------------------- what is measured


def flatness(model: nn.Module, train_set: Images, test_set: Images) -> Record:
    """Measure how flat the loss is around a network's weights, in eval mode."""
    model.eval()
    images, labels = train_set.images[:MEASURED], train_set.labels[:MEASURED]
    return {
        "rho": max(kfac_flat.spectral_radii(model, test_set.images[:MEASURED]).values()),
        "hessian": top_eigenvalue(model, images, labels),
        "relative_hessian": top_eigenvalue(model, images, labels, relative=True),
        "sharpness": sharpness(model, images, labels),
        "accuracy_under_noise": {str(noise): noisy_accuracy(model, test_set, noise) for noise in NOISES},
    }


def top_eigenvalue(model: nn.Module, images: Tensor, labels: Tensor, relative: bool = False) -> float:
    """Largest eigenvalue of the Hessian of the mean cross entropy, within 1 %.

    Args:
        model: In the mode in which it is measured.
        images: ``[N, ...]``.
        labels: ``[N]``.
        relative: Whether with respect to relative changes of the layers' weights rather than to all parameters.
    """
    parameters = [p for p in model.parameters() if p.dim() > 1 or not relative]
    times = TrueCurvature(model, images, labels).hessian(parameters)
    if relative:
        times = scaled(times, torch.cat([p.detach().flatten() for p in parameters]))
    generator = torch.Generator(images.device).manual_seed(0)
    start = [torch.randn(p.numel(), generator=generator, device=p.device, dtype=p.dtype) for p in parameters]
    return largest_eigenvalue(times, torch.cat(start))[0]


def scaled(times: Product, scale: Tensor) -> Product:
    """Return v -> D M D v, D the diagonal matrix of the scale."""
    return lambda v: scale * times(scale * v)


def noisy_accuracy(model: nn.Module, data: Images, noise: float, draws: int = DRAWS) -> float:
    """Mean accuracy (%) when weights of layers are multiplied by 1 plus normal noise; see :func:`disturbed`."""
    other, found = copy.deepcopy(model), []
    for weights in disturbed(model, noise, draws):
        other.load_state_dict(weights, strict=False)
        found.append(accuracy(other, data))
    return mean(found)


# ---------------------------------------------------------------- all runs


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for task in options.task:
            for sparsity in options.sparsity:
                for method in options.method:
                    epochs = options.epochs or TASKS[task].epochs
                    yield {"task": task, "method": method, "sparsity": sparsity, "seed": seed, "epochs": epochs}


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing."""
    data = cache(lambda name: loaded(TASKS[name], options.data_root, options.device))

    def make(record: Record, advance: Callable[[float], None]) -> Record:
        name, method, sparsity, seed, epochs = identity(record, IDENTITY)
        training = Training(TASKS[name], METHODS[method], sparsity, seed, epochs)
        return found(train(training, data(name), lambda: advance(1 / epochs)), data(name))

    about = circumstances(options.command, options.threads, options.device, ("torch", "torchvision"))
    make_missing(planned(options), IDENTITY, in_file_of_task(options.out), make, about, console)


def found(trained: Trained, data: tuple[Images, Images]) -> Record:
    """Say what came of a run."""
    train_set, test_set = data
    return {
        "accuracy": accuracy(trained.model, test_set),
        "seconds": trained.seconds,
        "neurons": measured(trained.model, train_set.images[:1])[0].neurons,
        **flatness(trained.model, train_set, test_set),
    }


# ---------------------------------------------------------------- the page

PREFACE = f"""\
# How flat the minima are

Written by `python -m benchmarks.flatness --report` from the runs of `python -m benchmarks.flatness`; mean ± standard
deviation (number of seeds). All networks start from the same weights and see the same batches; the pruned ones lose
their neurons by the same schedule and by Theta, so that only what the optimizer descends differs.

- HGNP: as it is by default. HGNP at every step: `every=1` and `mu=0.03`, all else as it is by default. Own labels:
  `fisher="empirical"` as well.
- rho: spectral radius of the K-FAC curvature, on {MEASURED} test images.
- Hessian: its top eigenvalue, of the loss on {MEASURED} training images, in eval mode. BatchNorm lets a network lower
  rho and this by larger weights alone.
- Relative Hessian: the same with respect to relative changes of the layers' weights, which larger weights do not lower.
- Sharpness: mean rise of the training loss when all weights of layers are multiplied by 1 plus normal noise of 0.1.
- Noise: mean test accuracy (%) when they are multiplied by 1 plus normal noise of that size, over {DRAWS} draws.
"""
COLUMNS = {"rho": "rho", "Hessian": "hessian", "relative Hessian": "relative_hessian", "sharpness": "sharpness"}


def page(records: Sequence[Record], pictures: Path) -> Iterator[str]:
    """Write the lines of the page, and draw its pictures."""
    yield from PREFACE.splitlines()
    for task, epochs in dict.fromkeys((r["task"], r["epochs"]) for r in records):
        own = [r for r in records if (r["task"], r["epochs"]) == (task, epochs)]
        levels = sorted({r["sparsity"] for r in own})
        picture = pictures / f"{task}-{epochs}.png"
        draw(own, levels, picture)
        yield from ("", f"## {task}, {epochs} epochs")
        for level in levels:
            yield from ("", named(level), "", *measures([r for r in own if r["sparsity"] == level]))
        yield from ("", f"![Accuracy under noise]({pictures.name}/{picture.name})")
        yield from ("", *(f"- {line}" for line in how_made(own)))


def named(level: float) -> str:
    """Write a sparsity."""
    return f"{level:.0%} of the neurons removed" if level else "Dense"


def of_methods(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by the label of their method, in the order of the labels."""
    return {label: own for name, label in LABELS.items() if (own := [r for r in runs if r["method"] == name])}


def measures(runs: Sequence[Record]) -> Iterator[str]:
    """Write what was measured of each method at one sparsity."""
    rows = [
        [
            f"{label} ({len(own)})",
            spread([r["accuracy"] for r in own]),
            *(spread([r[name] for r in own], "{:.3g}") for name in COLUMNS.values()),
            *(spread([r["accuracy_under_noise"][str(noise)] for r in own], "{:.1f}") for noise in NOISES),
        ]
        for label, own in of_methods(runs).items()
    ]
    yield from table(["trained by", "accuracy %", *COLUMNS, *(f"noise {noise:g}" for noise in NOISES)], rows)


def draw(runs: Sequence[Record], levels: Sequence[float], path: Path) -> None:
    """Draw accuracy against noise, one picture for each sparsity."""
    figure = Figure(figsize=(5 * len(levels), 3.8), layout="constrained")
    for axes, level in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        for label, own in of_methods([r for r in runs if r["sparsity"] == level]).items():
            means = [mean(r["accuracy_under_noise"][str(noise)] for r in own) for noise in NOISES]
            axes.plot([0, *NOISES], [mean(r["accuracy"] for r in own), *means], marker="o", markersize=3, label=label)
        axes.set(title=named(level), xlabel="relative noise of the weights", ylabel="test accuracy, %")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def report(options: argparse.Namespace) -> None:
    """Write the page of all runs there are."""
    records = [record for file in sorted(options.out.glob("*.jsonl")) for record in read_records(file)]
    if not records:
        raise SystemExit(f"{options.out} holds no runs yet")
    write_page(options.page, partial(page, records))


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    if options.report:
        report(options)
    else:
        run_all(options, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("flatness", "Compare methods by how flat the minima are that they end in.")
    tasks = [name for name, task in TASKS.items() if not task.pretrained]
    parser.add_argument("--task", nargs="+", choices=tasks, default=["digits"], help="what to train on")
    parser.add_argument("--method", nargs="+", choices=LABELS, default=list(LABELS), help="how")
    parser.add_argument("--sparsity", nargs="+", type=share, default=[0.0, 0.75], metavar="SHARE", help="of neurons")
    parser.add_shared("--seeds", default=list(range(5)))
    parser.add_shared("--epochs")
    parser.add_shared("--data-root")
    parser.add_shared("--device")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=RESULTS)
    parser.add_argument("--report", action="store_true", help="write the page of the runs there are, and run nothing")
    parser.add_argument("--page", type=Path, default=Path("docs/results/flatness.md"), help="where it is written")
    return parser.read(arguments)


if __name__ == "__main__":
    main()
