"""Train and prune a network, export it to ONNX, and see what it computes and how long it takes in onnxruntime.

The same network is trained dense and by HGNP, as in :mod:`examples.digits`. Both become ONNX files for batches of any
size; a pruned model is an ordinary one, and so nothing more than :func:`torch.onnx.export` is needed. The files are run
in onnxruntime on all test images, compared with torch's outputs, and all four are timed in turns.

Run it with ``python -m examples.export_onnx`` (``pip install -e ".[examples,export]"``); ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from examples.digits import (
    TIMED_BATCH,
    Images,
    Method,
    Run,
    Settings,
    at_least_zero,
    load_data,
    median_milliseconds,
    share,
    train_each,
    whole,
)
from examples.digits_report import Display

TOLERANCE = 1e-4  # of an output's largest entry, between two libraries in single precision


@dataclass(frozen=True)
class Exported:
    """A trained network and its ONNX file: what onnxruntime makes of the test images, and the times of a batch."""

    run: Run
    bytes: int
    accuracy: float
    difference: float
    torch_ms: float
    onnxruntime_ms: float


# ---------------------------------------------------------------- the file


def export(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a model as an ONNX file that takes any number of images."""
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():  # torch's own exporter still does what torch's own pytree deprecates
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        torch.onnx.export(
            *(model.eval(), (images,), path),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )


def opened(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load an ONNX file into onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def computed(session: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    """Return the logits ``[N, 10]`` that onnxruntime computes."""
    (entry,) = session.get_inputs()
    (logits,) = session.run(None, {entry.name: images.numpy()})
    return torch.from_numpy(logits)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference between outputs, relative to the largest of them.

    Raises:
        RuntimeError: if it is more than rounding explains.
    """
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE:
        raise RuntimeError(f"onnxruntime computes something else than torch: the outputs differ by {difference:.2%}")
    return difference


# ---------------------------------------------------------------- measuring


def measure(runs: Sequence[Run], paths: Sequence[Path], test_set: Images, threads: int) -> list[Exported]:
    """Export networks, compare what torch and onnxruntime compute, and time all of them in turns."""
    for run, path in zip(runs, paths, strict=True):
        export(run.model, test_set.images[:2], path)
    sessions = [opened(path, threads) for path in paths]
    batch = test_set.images[:TIMED_BATCH]
    calls = [*(partial(run.model, batch) for run in runs), *(partial(computed, session, batch) for session in sessions)]
    times = median_milliseconds(calls, batch.device)
    in_torch, in_onnxruntime = times[: len(runs)], times[len(runs) :]

    exported = []
    for run, path, session, *both in zip(runs, paths, sessions, in_torch, in_onnxruntime, strict=True):
        found = computed(session, test_set.images)
        with torch.inference_mode():
            difference = relative_difference(found, run.model(test_set.images))
        accuracy = 100 * (found.argmax(1) == test_set.labels).float().mean().item()
        exported.append(Exported(run, path.stat().st_size, accuracy, difference, *both))
    return exported


def print_table(console: Console, results: dict[str, Exported]) -> None:
    """Print one row per network."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    headings = ("accuracy in\nonnxruntime", "outputs\ndiffer by", "parameters", "MACs", "file\nkB")
    for heading in (*headings, "torch\nms", "onnxruntime\nms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in results.items():
        times = (f"{of.torch_ms:.2f}", f"{of.onnxruntime_ms:.2f}")
        sizes = (f"{of.run.size.parameters:,}", f"{of.run.size.macs:,}", f"{of.bytes / 1000:,.0f}")
        table.add_row(name, f"{of.accuracy:.2f} %", f"{of.difference:.0e}", *sizes, *times)
    console.print(table)
    dense, pruned = results.values()
    console.print(
        f"ms: {TIMED_BATCH} images, median of repetitions in turns. The pruned network is "
        f"{dense.torch_ms / pruned.torch_ms:.1f} times as fast in torch and "
        f"{dense.onnxruntime_ms / pruned.onnxruntime_ms:.1f} times in onnxruntime."
    )


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    start = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    settings = Settings(epochs=options.epochs, width=options.width, seed=options.seed)
    methods = (Method("dense"), Method("pruned", options.mu, options.target))
    train_set, test_set = load_data("cpu")
    with Display(console) as display:
        runs = train_each(methods, settings, train_set, test_set, display, "")
    paths = [options.out / f"{method.name}.onnx" for method in methods]
    exported = measure(runs, paths, test_set, options.threads)
    print_table(console, {method.name: found for method, found in zip(methods, exported, strict=True)})
    console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
    console.print(
        f"{time.perf_counter() - start:.0f} s in all; torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, {options.threads} threads"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.export_onnx",
        description="Prune a small residual network, export it to ONNX, run it in onnxruntime.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--target", type=share, default=0.75, help="share of the neurons to remove, in (0, 1)")
    parser.add_argument("--mu", type=at_least_zero, default=0.003, help="weight of the curvature penalty")
    parser.add_argument("--epochs", type=whole(2), default=8, help="epochs of training, at least 2")
    parser.add_argument("--width", type=whole(2), default=32, help="channels of the first block")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the images")
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads, of torch and of onnxruntime")
    parser.add_argument("--out", type=Path, default=Path("runs/export_onnx"), help="folder for the ONNX files")
    options = parser.parse_args(arguments)
    if options.out.is_file():
        parser.error(f"--out {options.out}: this is a file, not a folder")
    return options


if __name__ == "__main__":
    main()
