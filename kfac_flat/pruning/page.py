"""What a pruning step or a whole run did to a model, as a page to look at in a browser."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import kfac_flat
from kfac_flat.page import charts
from kfac_flat.page.markup import Column, Markup, Section, details, dotted, element, joined, page, table
from kfac_flat.pruning.report import PruneReport, Size
from kfac_flat.pruning.text import by_reason, fewer, percent

# So that a page stays small, a layer's channels are drawn in so many cells at most, which several channels share in
# wider layers, and so many ranges of positions are written; fewer where there are many layers, but some in any case.
_CELLS = {"page": 30_000, "most": 256, "least": 64}
_RANGES = {"page": 20_000, "most": 20_000, "least": 40}
_SHADES = 4  # of a cell, to show how many of its channels are left

SIZES = {"neurons": "Neurons", "parameters": "Parameters", "macs": "MACs", "latency": "Latency"}


def write_step(report: PruneReport, path: str | os.PathLike[str], title: str) -> Path:
    """Write the page of one step, and return its path."""
    sections = [
        _sizes(report),
        layers_section(report.widths_before, report.widths_after, report.frozen),
        *([_removed(report)] if report else []),
        *frozen_section(report.frozen),
    ]
    lead = f"Epoch {report.epoch}: {report.sparsity:.1%} of the neurons removed."
    return write(path, title, [lead, report.reason], sections)


def write_run(
    run: PruneReport,
    history: Sequence[PruneReport],
    series: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    title: str,
) -> Path:
    """Write the page of a whole run, and return its path.

    Args:
        run: What has become of the dense model, as a single report.
        history: The reports of its steps, as far as they are known.
        series: What else is drawn over the epochs: one value for each report, by name.
        path: Where to save the page.
        title: Stands above it.

    Raises:
        ValueError: if there are more or fewer values than reports.
    """
    for name, values in series.items():
        if len(values) != len(history):
            raise ValueError(
                f"series[{name!r}] has {len(values)} values, but there were {len(history)} steps: give one value for "
                "each report in pruner.history, float('nan') where there is none"
            )
    sections = [
        _sizes(run),
        *([_over_time(run, history, series)] if history else []),
        layers_section(run.widths_before, run.widths_after, run.frozen),
        *([_survivors(run)] if run else []),
        *frozen_section(run.frozen),
    ]
    lead = f"After epoch {run.epoch}, {run.sparsity:.1%} of the neurons have been removed."
    return write(path, title, [lead, history[-1].reason if history else ""], sections)


def write(path: str | os.PathLike[str], title: str, lead: Iterable[str], sections: Sequence[Section]) -> Path:
    """Write a page of the library's, and return its path."""
    paragraphs = joined(element("p", text[0].upper() + text[1:]) for text in lead if text)
    written = page(title, paragraphs, sections, f"Made by kfac-flat {kfac_flat.__version__}.")
    Path(path).write_text(written, encoding="utf-8")
    return Path(path)


# ---------------------------------------------------------------- sizes


def _sizes(report: PruneReport) -> Section:
    """Show each size afterwards, large, and what it was before."""
    tiles = []
    for name, title in SIZES.items():
        was, is_ = getattr(report.before, name), getattr(report.after, name)
        if was is not None and is_ is not None:
            note = f"of {_amount(name, was)}, {fewer(was, is_)}"
            tiles.append(tile(title, _amount(name, is_), is_ / was if was else 0.0, note))
    return Section("size", "Size of the model", element("dl", *tiles, class_="tiles"))


def tile(title: str, value: str, share: float, note: str) -> Markup:
    """Show a number, large, and a share as a bar."""
    bar = element("span", element("i", style=_width(share)), class_="share", aria_hidden="true")
    return element("div", element("dt", title), element("dd", element("b", value), bar, note))


def _amount(name: str, value: float) -> str:
    return f"{1000 * value:.3g} ms" if name == "latency" else f"{value:,}"


def _width(share: float) -> str:
    return f"width:{100 * min(share, 1.0):.4g}%"


# ---------------------------------------------------------------- over time


def _over_time(run: PruneReport, history: Sequence[PruneReport], series: Mapping[str, Sequence[float]]) -> Section:
    epochs = [report.epoch for report in history]
    span = epochs[0] - 1, epochs[-1]
    cuts = [report.epoch for report in history if report]
    curves = [
        *(charts.Series(name, list(zip(epochs, map(float, values), strict=True))) for name, values in series.items()),
        _sparsity(run, history),
        *_size_curves(history),
    ]
    return Section(
        "time",
        "Over time",
        joined(
            [
                element(
                    "p",
                    element("span", class_="key", aria_hidden="true"),
                    "marks the epochs at whose end neurons went. Sizes are those afterwards.",
                    class_="note",
                ),
                element("div", *(charts.chart(curve, span, cuts) for curve in curves), class_="charts"),
                details("All values, by epoch", _values(history, curves)),
            ]
        ),
    )


def _sparsity(run: PruneReport, history: Sequence[PruneReport]) -> charts.Series:
    shares = [1 - size.neurons / run.before.neurons for size in _all_sizes(history)]
    points = list(zip(_all_epochs(history), shares, strict=True))
    return charts.Series("Sparsity", points, "{:.1%}".format, "{:.0%}".format, steps=True, from_zero=True)


def _size_curves(history: Sequence[PruneReport]) -> list[charts.Series]:
    curves = []
    for name, title in SIZES.items():
        values = [getattr(size, name) for size in _all_sizes(history)]
        if name == "neurons" or None in values:  # of neurons, sparsity tells
            continue
        points = list(zip(_all_epochs(history), values, strict=True))
        form = partial(_amount, name)
        tick = form if name == "latency" else charts.compact
        curves.append(charts.Series(title, points, form, tick, steps=True, from_zero=True))
    return curves


def _all_sizes(history: Sequence[PruneReport]) -> list[Size]:
    return [history[0].before, *(report.after for report in history)]


def _all_epochs(history: Sequence[PruneReport]) -> list[int]:
    return [history[0].epoch - 1, *(report.epoch for report in history)]


def _values(history: Sequence[PruneReport], curves: Sequence[charts.Series]) -> Markup:
    written = [[curve.form(value) for _, value in curve.points[-len(history) :]] for curve in curves]
    rows = [
        [str(report.epoch), *values, f"{report.after.neurons:,}"]
        for report, *values in zip(history, *written, strict=True)
    ]
    columns = [Column(title) for title in ("Epoch", *(curve.title for curve in curves), "Neurons")]
    return table("Values at the end of each epoch", columns, rows)


# ---------------------------------------------------------------- layers


def layers_section(
    before: Mapping[str, int],
    after: Mapping[str, int],
    frozen: Mapping[str, str],
    caption: str = "Output channels of each layer",
) -> Section:
    """List all layers with their widths as numbers and as bars."""
    most, rows = max(before.values(), default=1), []
    for name, was in before.items():
        lost = was - after[name]
        bar = element(
            "span",
            element("i", style=_width(after[name] / was)),
            class_="bar" if lost or name not in frozen else "bar whole",
            style=_width(was / most),
            aria_hidden="true",
        )
        gone = percent(lost, was) if lost else "-"
        rows.append([_with_picture(layer_label(name, frozen), bar), f"{was:,}", f"{after[name]:,}", gone])
    columns = [Column("Layer", "text"), Column("Before"), Column("After"), Column("Gone")]
    return Section("layers", "Layers", table(caption, columns, rows))


def layer_label(name: str, frozen: Mapping[str, str]) -> Markup:
    """Write a layer's name and, where it is frozen, the number of the reason."""
    tag = [" ", element("span", f"frozen ({_numbers(frozen)[frozen[name]]})", class_="tag")] if name in frozen else []
    return element("span", dotted(name), *tag)


def _with_picture(name: Markup, picture: Markup) -> Markup:
    """Put a picture beside a layer's name, or under it where there is no room."""
    return element("div", name, element("span", picture), class_="named")


# ---------------------------------------------------------------- channels


def _removed(report: PruneReport) -> Section:
    """List what went, by original positions."""
    limit = _each(_RANGES, len(report.removed))
    rows = [[dotted(name), f"{len(gone):,}", ranges(gone, limit)] for name, gone in report.removed.items()]
    caption = "Channels that went, by their positions in the original layer, from 0"
    columns = [Column("Layer", "text"), Column("Gone"), Column("Positions", "wide")]
    return Section("channels", "Channels that went", table(caption, columns, rows))


def _survivors(run: PruneReport) -> Section:
    """Show where in each original layer the channels stood that are left."""
    limit, cells = (_each(limits, len(run.removed)) for limits in (_RANGES, _CELLS))
    strips, positions = [], []
    for name, gone in run.removed.items():
        stays = torch.ones(run.widths_before[name], dtype=torch.bool)
        stays[gone] = False
        left = f"{int(stays.sum()):,} of {len(stays):,}"
        drawn = strip(stays, f"{name}: {left} channels left", cells)
        strips.append([_with_picture(element("span", dotted(name)), drawn), left])
        positions.append([dotted(name), ranges(stays.nonzero().flatten(), limit)])
    columns = [Column("Layer", "text"), Column("Left")]
    caption = "The original channels of each layer, from left to right; those that are left stand out"
    by_number = table(
        "Original positions of the channels that are left, from 0",
        [Column("Layer", "text"), Column("Positions", "wide")],
        positions,
    )
    content = joined([table(caption, columns, strips), details("Positions as numbers", by_number)])
    return Section("channels", "Channels that survived", content)


def _each(limits: Mapping[str, int], layers: int) -> int:
    """Divide what a page may hold among its layers."""
    return min(limits["most"], max(limits["least"], limits["page"] // max(1, layers)))


def ranges(positions: Tensor, limit: int) -> str:
    """Write ascending positions, those that follow each other as a range.

    Example:
        >>> ranges(torch.tensor([0, 1, 2, 5, 7, 8]), 10), ranges(torch.tensor([1, 3, 5, 7]), 2)
        ('0-2, 5, 7, 8', '1, 3, and 2 more')
    """
    runs = _runs(positions.tolist())
    written = [_range(start, end - 1) for start, end in runs[:limit]]
    rest = sum(end - start for start, end in runs[limit:])
    return ", ".join([*written, *([f"and {rest:,} more"] if rest else [])]) or "none"


def _range(first: int, last: int) -> str:
    if last - first < 2:
        return ", ".join(map(str, range(first, last + 1)))
    return f"{first}-{last}"


def strip(stays: Tensor, label: str, most: int) -> Markup:
    """Draw a layer's channels side by side, those that stay filled; where they share a cell, the fuller the more do."""
    cells = min(len(stays), most)
    cell = torch.arange(len(stays)) * cells // len(stays)
    share = torch.zeros(cells).index_add(0, cell, stays.float()) / torch.bincount(cell, minlength=cells)
    shades = (share * _SHADES).ceil().long().tolist()
    paths = []
    for shade in range(1, _SHADES + 1):
        runs = _runs(i for i, s in enumerate(shades) if s == shade)
        if runs:
            d = "".join(f"M{start} 0h{end - start}v1H{start}" for start, end in runs)
            paths.append(element("path", d=d, opacity=None if shade == _SHADES else shade / _SHADES))
    return element(
        "svg",
        *paths,
        viewBox=f"0 0 {cells} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
        class_="strip",
    )


def _runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Join positions that follow each other: start and end of each run."""
    runs: list[tuple[int, int]] = []
    for i in positions:
        if runs and runs[-1][1] == i:
            runs[-1] = runs[-1][0], i + 1
        else:
            runs.append((i, i + 1))
    return runs


# ---------------------------------------------------------------- what stays


def frozen_section(frozen: Mapping[str, str]) -> list[Section]:
    """Say what cannot lose neurons, and why; nothing where there is nothing to say."""
    if not frozen:
        return []
    names, content = by_reason(frozen), []
    for reason, number in _numbers(frozen).items():
        content += [element("dt", f"({number}) {reason}"), element("dd", joined(map(dotted, names[reason]), ", "))]
    return [Section("frozen", "What is frozen, and why", element("dl", *content, class_="reasons"))]


def _numbers(frozen: Mapping[str, str]) -> dict[str, int]:
    """Number the reasons, in the order in which they come."""
    return {reason: number for number, reason in enumerate(dict.fromkeys(frozen.values()), 1)}
