"""Pictures of pruned networks; the one module that needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from kfac_flat.pruning.text import shortened

# Colours that stay apart for every kind of colour vision [Okabe & Ito 2008].
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
INK, MUTED, FAINT = "#222222", "#6b6b6b", "#e4e4e4"

_ROWS = 48  # layers in one panel; more panels stand side by side
_NAME = 40  # characters of a layer's name
_BAR, _ROW = 0.76, 0.84  # heights of all bars of a layer and of what lies behind them, of the distance to the next


def draw_widths(
    before: Mapping[str, int],
    after: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    title: str,
    rest: str,
    whole: Collection[str] = (),
) -> Path:
    """Draw how many output channels each layer has left, within the bar of how many it had.

    Args:
        before: The layers' original widths, by name.
        after: What is left of them, by the name of the method (at most four) and the layer.
        path: Where to save the picture.
        title: Stands above it.
        rest: What the bar behind is called.
        whole: Layers that cannot be cut, drawn hatched.

    Returns:
        The path.
    """
    layers = list(before)
    columns = max(1, math.ceil(len(layers) / _ROWS))
    rows = math.ceil(len(layers) / columns)
    line = 0.25 + 0.22 * (len(after) - 1)
    figure = Figure(figsize=(7.5 if columns == 1 else 6 * columns, rows * line + 1.7), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharex=True)[0]
    for i, axes in enumerate(panels):
        _draw_panel(axes, layers[i * rows : (i + 1) * rows], before, after, whole)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_xlim(0, 1.25 * max(before.values(), default=1))  # room for the numbers behind the longest bar
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK, parse_math=False)
    handles = [Patch(color=colour, label=name) for name, colour in zip(after, COLOURS, strict=False)]
    handles.append(Patch(color=FAINT, label=rest))
    if whole:
        handles.append(Patch(facecolor=FAINT, edgecolor=MUTED, hatch="////", lw=0, label="frozen"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=11)
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(
    axes: Axes,
    layers: Sequence[str],
    before: Mapping[str, int],
    after: Mapping[str, Mapping[str, float]],
    whole: Collection[str],
) -> None:
    """Draw some of the layers from top to bottom."""
    tidy(axes, grid="x")
    pitch = _BAR / len(after)
    for row, layer in enumerate(layers):
        if layer in whole:
            axes.barh(row, before[layer], height=_BAR, facecolor=FAINT, edgecolor=MUTED, hatch="////", lw=0)
            _label(axes, before[layer], row, f"{before[layer]:,}", "", MUTED)
            continue
        axes.barh(row, before[layer], height=_ROW, color=FAINT, lw=0)
        for i, (widths, colour) in enumerate(zip(after.values(), COLOURS, strict=False)):
            at = row + (i - (len(after) - 1) / 2) * pitch
            axes.barh(at, widths[layer], height=0.84 * pitch, color=colour, lw=0)
            number = f"{widths[layer]:,.1f}".removesuffix(".0")
            _label(axes, before[layer], at, number, f" of {before[layer]:,}", colour)
    axes.set_yticks(range(len(layers)), [shortened(layer, _NAME) for layer in layers], parse_math=False)
    axes.tick_params(axis="both", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("output channels", color=INK)


def _label(axes: Axes, x: float, y: float, number: str, rest: str, colour: str) -> None:
    """Write numbers behind a bar, the first in its colour."""
    offset = "offset points"
    first = axes.annotate(
        number, (x, y), (4, 0), textcoords=offset, va="center", fontsize=9, color=colour, fontweight="bold"
    )
    if rest:
        axes.annotate(rest, (1, 0), (0, 0), xycoords=first, textcoords=offset, va="bottom", fontsize=9, color=MUTED)


def tidy(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Leave only the lines that help to read a value."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
