"""The page and the picture of what :mod:`benchmarks.step_cost` has measured, every number from its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.records import one_line
from benchmarks.report import table

PREFACE = """\
# What a step costs

Written by `python -m benchmarks.step_cost --report` from the files that `python -m benchmarks.step_cost` has left in
`benchmarks/results/step_cost/`.

- A number is the time of a step relative to one of bare SGD on the same batch, the median over rounds in which each row
  makes one step in turn; in brackets the peak of all tensors alive at once, relative to bare SGD's. A process may grow
  by more: what its allocator cannot use again comes on top.
- FlatKFAC's steps are of three kinds: those between refreshes are bare SGD's; a *refresh* reads the layer that
  attains the maximum and differentiates its radius; a *survey* is a refresh that looks at all layers. What a schedule
  costs per step follows from these, what it takes of memory is the most that any of them does.
- *eigenpairs of all layers* is a bare step and what one power step of a survey takes, without the pass over the batch
  that reads the layers.
- *default* is the schedule that FlatKFAC has by default, named below the table. *every=1, full batch* refreshes at
  every step on all of the batch. Unless it says otherwise, every fourth refresh is a survey, and a quarter of the batch
  is read.
- Cells are empty where a method cannot train the network: BackPACK's factors know few kinds of layers, and exact
  factors of more than 2048 rows are not waited for.
"""
ON_A_GPU = """\
## On a GPU

Not measured yet. Meanwhile `python -m pytest tests/test_pretend_gpu.py` runs the optimizers and pruners on a device
that is not the CPU, made of the CPU's tensors: mixing devices is an error there, and all comes out as on the CPU to the
last bit. Steps of FlatKFAC and the readings of pruners do not wait for the device either, but for the first refresh,
the first after a cut or with a layer that was not there before, `eigenpairs="exact"`, and gradients accumulated over
micro-batches with an argument that has no axis of examples. What a device's own kernels do is not seen. These commands
will tell:

    python -m pytest tests/test_gpu.py
    python -m benchmarks.step_cost --device cuda --batch-size 128 --name cuda
    python -m benchmarks.step_cost --device cuda --batch-size 128 --bfloat16 --channels-last --name cuda-bfloat16
    python -m benchmarks.step_cost --device cuda --batch-size 128 --widths 32 64 128 256 512 --name cuda-widths
    torchrun --nproc-per-node 2 -m examples.ddp
    python -m benchmarks.step_cost --report

The first proves that `step()` never waits for the device (`torch.cuda.set_sync_debug_mode("error")`); the last but one
talks over NCCL where each process has a GPU of its own.
"""
CURVES = ("default", "every=4", "every=16", "every=1, quarter batch", "every=1, full batch", "SAM")


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the measurements there are, by the names of their files.

    Raises:
        SystemExit: if there are none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"{folder} holds no measurements yet: make some with python -m benchmarks.step_cost")
    return {file.stem: json.loads(file.read_text()) for file in files}


def lines(found: Mapping[str, Mapping[str, Any]], pictures: Path) -> Iterator[str]:
    """Write the page, and draw its pictures."""
    yield from PREFACE.splitlines()
    for name, measured in found.items():
        results = measured["results"]
        yield from ("", f"## {title(measured)}", "", *table(["", *results], rows(results)))
        axis = swept(results)
        if axis:
            picture = pictures / f"{name}.png"
            draw(results, axis, picture)
            yield from ("", f"![Cost against {axis.replace('_', ' ')}]({pictures.name}/{picture.name})")
        yield from ("", *(f"- {what}: {one_line(measured[what])}" for what in measured if what != "results"))
    if not any("cuda" in measured["command"] for measured in found.values()):
        yield from ("", *ON_A_GPU.splitlines())


def title(measured: Mapping[str, Any]) -> str:
    """Say what was measured."""
    axis = swept(measured["results"])
    what = {"": "Networks", "width": "Against width", "batch_size": "Against batch size"}[axis]
    batch = f", batches of {measured['batch size']}" if "batch size" in measured else ""
    return f"{what}{batch}, {measured['hardware']}"


def swept(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Tell which size was varied; empty if these are different networks."""
    axes = [axis for axis in ("width", "batch_size") if len({r.get(axis) for r in results.values()}) > 1]
    return axes[0] if axes else ""


def rows(results: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """Write what is told of each row, then the seconds of a bare step, a cell for each network."""
    for row in dict.fromkeys(row for result in results.values() for row in result["time"]):
        yield [row, *(cell(result, row) for result in results.values())]
    yield ["seconds of a bare step", *(f"{result['seconds']:.3g}" for result in results.values())]


def cell(result: Mapping[str, Any], row: str) -> str:
    """Write time and, where it is known, memory."""
    time, memory = result["time"].get(row), result["memory"].get(row)
    return "" if time is None else f"{time:.2f}" + ("" if memory is None else f" ({memory:.2f})")


def draw(results: Mapping[str, Mapping[str, Any]], axis: str, path: Path) -> None:
    """Draw relative cost, and seconds of bare steps and default ones, against the size that was varied."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes: Sequence[int] = [result[axis] for result in results.values()]
    measured = set.intersection(*(set(result["time"]) for result in results.values()))
    for row in (row for row in CURVES if row in measured):
        left.plot(sizes, [result["time"][row] for result in results.values()], marker="o", label=row)
    for row in ("bare SGD", "default"):
        seconds = [result["seconds"] * result["time"][row] for result in results.values()]
        right.plot(sizes, seconds, marker="o", label=row)
    power, growth = (2, "width²") if axis == "width" else (1, "batch")
    last = list(results.values())[-1]["seconds"]
    right.plot(sizes, [last * (size / sizes[-1]) ** power for size in sizes], ":", color="0.5", label=f"∝ {growth}")
    left.set(xlabel=axis.replace("_", " "), ylabel="time of a step, relative to bare SGD", xscale="log", ylim=(0, None))
    right.set(xlabel=axis.replace("_", " "), ylabel="seconds of a step", xscale="log", yscale="log")
    for axes in (left, right):
        axes.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
