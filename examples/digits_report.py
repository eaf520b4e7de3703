"""What ``examples.digits`` shows: a live display, a table, two pictures, a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from kfac_flat.pruning import picture

if TYPE_CHECKING:
    from examples.digits import Epoch, Run, Settings

COLOURS = ("#5f5f5f", *picture.COLOURS[:2])  # the dense network in grey
STYLES = ((0, ()), (0, ()), (0, (4, 1.5)))


# ---------------------------------------------------------------- while it runs


class Display:
    """One live bar per network; where the output is no terminal, one line per finished network."""

    def __init__(self, console: Console) -> None:
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def task(self, label: str, epochs: int) -> Iterator[Callable[[Epoch], None]]:
        """Show the training of one network; yields what is to be called with each epoch."""
        task = self._progress.add_task(label, total=epochs, status="")
        status = ""

        def on_epoch(epoch: Epoch) -> None:
            nonlocal status
            status = f"{epoch.accuracy:6.2f} %, {1 - epoch.sparsity:4.0%} neurons, rho {epoch.rho:5.2f}"
            self._progress.update(task, advance=1, status=status)

        yield on_epoch
        if not self._live:
            self._progress.console.print(f"{label:<28} {epochs} epochs  {status}")


# ---------------------------------------------------------------- the table


def print_table(console: Console, results: Mapping[str, Sequence[Run]], batch: int) -> None:
    """Print one row per method, with mean and standard deviation where there are several seeds."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("after the last epoch", no_wrap=True)
    for heading in ("test\naccuracy", "neurons", "parameters", "MACs", "rho", "ms per\nbatch"):
        table.add_column(heading, justify="right")
    for name, runs in results.items():
        table.add_row(
            name,
            spread([run.last.accuracy for run in runs], ".2f") + " %",
            spread([run.size.neurons for run in runs], ",.0f"),
            spread([run.size.parameters for run in runs], ",.0f"),
            spread([run.size.macs for run in runs], ",.0f"),
            spread([run.last.rho for run in runs], ".2f"),
            spread([run.milliseconds for run in runs], ".2f"),
        )
    console.print(table)
    dense, hgnp, _ = results.values()
    difference = [pruned.last.accuracy - whole.last.accuracy for pruned, whole in zip(hgnp, dense, strict=True)]
    seeds = f" ({len(dense)} seeds, mean ± standard deviation)" if len(dense) > 1 else ""
    console.print(f"ms per batch: inference on {batch} images, median of repetitions in turns")
    console.print(f"HGNP minus dense: {spread(difference, '+.2f')} points of accuracy{seeds}")


def spread(values: Sequence[float], form: str) -> str:
    """Format a value, or mean and standard deviation of several."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{mean(values):{form}} ± {stdev(values):{form.lstrip('+')}}"


# ---------------------------------------------------------------- the pictures


def draw_history(results: Mapping[str, Sequence[Run]], path: Path, settings: Settings) -> None:
    """Draw accuracy, rho and remaining neurons over the epochs; several seeds as their mean and range."""
    figure = Figure(figsize=(8, 8.2), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    figure.get_layout_engine().set(hspace=0.07)
    for axes, quantity in zip(panels, ("accuracy", "rho", "sparsity"), strict=True):
        picture.tidy(axes)
        axes.axvspan(settings.start, settings.start + settings.events - 1, color="#f4f1e8", zorder=0)
        for (name, runs), colour, style in zip(results.items(), COLOURS, STYLES, strict=True):
            curves = [[getattr(epoch, quantity) for epoch in run.epochs] for run in runs]
            draw_curves(axes, curves, colour, style, name, steps=quantity == "sparsity")
    accuracy, rho, sparsity = panels
    accuracy.set_title("Test accuracy (%), scale stretched toward 100", loc="left")
    accuracy.set_yscale("function", functions=(stretch, unstretch))
    accuracy.set_ylim(0, 100.1)
    accuracy.set_yticks([0, 50, 80, 90, 95, 98, 99, 100])
    accuracy.annotate(
        "neurons leave, once an epoch",
        (settings.start + (settings.events - 1) / 2, 0.03),
        xycoords=("data", "axes fraction"),
        ha="center",
        color="#7a6a3a",
    )
    rho.set_title("Spectral radius rho on the test images (log scale): lower is flatter", loc="left")
    rho.set_yscale("log")
    rho.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    rho.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    rho.yaxis.set_minor_locator(NullLocator())
    sparsity.set_title("Share of the neurons removed, the same for both pruned networks", loc="left")
    sparsity.set_ylim(-0.03, 1)
    sparsity.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    seeds = len(next(iter(results.values())))
    sparsity.set_xlabel("epoch" if seeds == 1 else f"epoch (lines: mean of {seeds} seeds; bands: lowest to highest)")
    sparsity.set_xlim(1, settings.epochs)
    sparsity.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=3, frameon=False, labelcolor="linecolor", fontsize=12
    )
    figure.savefig(path, dpi=160)


def draw_curves(
    axes: Axes, curves: Sequence[Sequence[float]], colour: str, style: object, name: str, steps: bool
) -> None:
    """Draw the mean of several runs over a band from the lowest to the highest."""
    drawstyle = "steps-pre" if steps else "default"  # neurons go at the end of an epoch, after its measurement
    epochs = range(1, len(curves[0]) + 1)
    at_epoch = list(zip(*curves, strict=True))
    axes.plot(
        epochs, [mean(values) for values in at_epoch], color=colour, ls=style, lw=2.2, label=name, drawstyle=drawstyle
    )
    if len(curves) > 1 and not steps:
        axes.fill_between(epochs, list(map(min, at_epoch)), list(map(max, at_epoch)), color=colour, alpha=0.12, lw=0)


def stretch(accuracy: np.ndarray) -> np.ndarray:
    """Scale accuracies (%) by the order of magnitude of the errors, finite at 100."""
    return -np.log10(np.maximum(100.4 - accuracy, 0.1))


def unstretch(scaled: np.ndarray) -> np.ndarray:
    """Undo :func:`stretch`."""
    return 100.4 - 10**-scaled


def draw_widths(results: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draw how many output channels each layer has left, within the bar of how many it had."""
    (_, dense), *pruned = results.items()
    before = {layer: width for layer, width in dense[0].widths.items() if layer != "head"}  # its outputs are digits
    after = {name: {layer: mean(run.widths[layer] for run in runs) for layer in before} for name, runs in pruned}
    seeds = f" (mean of {len(dense)} seeds)" if len(dense) > 1 else ""
    picture.draw_widths(before, after, path, title=f"Width of each layer, before and after{seeds}", rest="dense")


# ---------------------------------------------------------------- the page


def write_page(results: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Write what happened to the network that HGNP trained first, epoch by epoch, as a page for the browser."""
    run = results["HGNP"][0]
    assert run.pruner is not None
    series = {
        "Test accuracy (%)": [epoch.accuracy for epoch in run.epochs],
        "rho": [epoch.rho for epoch in run.epochs],
    }
    run.pruner.html(path, series=series, title="HGNP on scikit-learn's digits")
