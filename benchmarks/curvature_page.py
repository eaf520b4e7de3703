"""The page and the pictures of the runs that :mod:`benchmarks.curvature` has made, every number from these runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, median

import torch
from matplotlib.figure import Figure

from benchmarks.defaults import SGD
from benchmarks.records import Record, how_made, spread
from benchmarks.report import label_logarithmic, table

PREFACE = """\
# Does rho follow the true curvature, and do networks lower it by growing their weights?

Written by `python -m benchmarks.curvature --report` from the runs of `python -m benchmarks.curvature`.

- rho: lambda_max(A) lambda_max(G) of a layer as the penalty has it, from one random combination of the labels'
  gradients for each image; *expected* rho has all labels with their probabilities instead, which takes as many passes
  as there are classes.
- GGN, Hessian: their largest eigenvalue, by Lanczos iteration on the same images, of a layer's weight alone or of all
  parameters. The GGN is what A (x) G approximates. Where a network is piecewise linear (ReLU, no BatchNorm), a layer's
  block of the Hessian IS that of the GGN. For a convolution A (x) G takes the gradients at its positions to be
  uncorrelated; where they agree, the true curvature is larger, up to as many times as there are positions.
- All are taken in training mode, on the same 32 training images at each stop, with the same random numbers.
- The largest eigenvalue of all parameters' GGN lies between the largest of those of its blocks and their sum.
- Sharpness: mean rise of the loss on these images in eval mode when all weights of layers are multiplied by 1 plus
  normal noise of 0.1.
"""
ABOUT_GROWTH = """\
BatchNorm makes the function independent of the length of the weights in front of it, and rho_l falls as 1 / |W_l|^2. So
descending rho lengthens them: <d rho_l / dW_l, W_l> = -2 rho_l, a part that the loss does not have. rho_l |W_l|^2, the
radius for changes relative to the weight, does not depend on their length; nor on scale that moves from a layer
through a ReLU into the next. The learning rate's effect on such weights goes as lr / |W_l|^2, so what the length gains,
it loses. Factors are relative to SGD from the same seed at the end of training, as geometric means over the layers in
front of BatchNorm and the seeds; that of rho is the product of those of rho |W|^2 and of 1 / |W|^2.
"""
COLOURS = {"rho": "C0", "expected_rho": "C1", "ggn": "C2", "hessian": "C3"}
LABELS = {"rho": "rho", "expected_rho": "rho, all labels", "ggn": "GGN", "hessian": "Hessian"}

# ---------------------------------------------------------------- numbers

Values = Callable[[Record], float]


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation (Spearman); values that are alike are ranked in their order."""
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort().argsort().double()
    return float(torch.corrcoef(ranks)[0, 1])


def largest_rho(measured: Record) -> float:
    """Return expected rho of the network, the maximum over its layers."""
    return max(layer["expected_rho"] for layer in measured["layers"].values())


def measurements(runs: Iterable[Record]) -> list[Record]:
    """Return all that was measured in runs."""
    return [measured for r in runs for measured in r["measured"]]


def growth(runs: Sequence[Record], setting: str) -> list[tuple[float, float]]:
    """Factors by which squared length and expected rho differ from SGD's at the end, one pair for each seed.

    Geometric means over the layers in front of BatchNorm.
    """
    reference = {r["seed"]: r["measured"][-1]["layers"] for r in runs if r["setting"] == SGD}
    factors = []
    for r in runs:
        if r["setting"] == setting != SGD and r["seed"] in reference and r["invariant"]:
            own, other = r["measured"][-1]["layers"], reference[r["seed"]]
            length, rho = (
                geometric_mean([own[name][kind] / other[name][kind] for name in r["invariant"]])
                for kind in ("squared_norm", "expected_rho")
            )
            factors.append((length, rho))
    return factors


# ---------------------------------------------------------------- tables


def agreement(runs: Sequence[Record]) -> Iterator[str]:
    """Write how rho compares with the true curvature, layer by layer and for the whole network."""
    found = measurements(runs)
    layers = {name: [at["layers"][name] for at in found] for name in found[0]["layers"]}
    together = [layer for own in layers.values() for layer in own]
    radii = [{kind: [w[kind] for w in at["layers"].values()] for kind in ("rho", "expected_rho")} for at in found]
    networks = {
        f"{of.__name__} of layers, all parameters": [
            {kind: of(values) for kind, values in own.items()} | at for own, at in zip(radii, found, strict=True)
        ]
        for of in (max, sum)
    }
    header = ["", "rho / GGN", "expected rho / GGN", "rho, GGN", "expected rho, GGN", "expected rho, Hessian"]
    rows = {**layers, "all layers": together, **networks}
    yield from table(header, ([name, *_agreement(own)] for name, own in rows.items()))


def _agreement(own: Sequence[Record]) -> Iterator[str]:
    for kind in ("rho", "expected_rho"):
        ratios = sorted(at[kind] / at["ggn"] for at in own)
        yield f"{median(ratios):.2g} ({ratios[0]:.2g} to {ratios[-1]:.2g})"
    for a, b in (("rho", "ggn"), ("expected_rho", "ggn"), ("expected_rho", "hessian")):
        yield f"{correlation([at[a] for at in own], [at[b] for at in own]):.2f}"


def endings(runs: Sequence[Record]) -> Iterator[str]:
    """Write what each setting comes to at the end of training."""
    columns: dict[str, tuple[Values, str]] = {
        "expected rho": (largest_rho, "{:.3g}"),
        "GGN": (lambda at: at["ggn"], "{:.3g}"),
        "Hessian": (lambda at: at["hessian"], "{:.3g}"),
        "sharpness": (lambda at: at["sharpness"], "{:.2g}"),
    }
    rows = []
    for setting in settings_of(runs):
        own = [r for r in runs if r["setting"] == setting]
        flatness = [spread([of(r["measured"][-1]) for r in own], form) for of, form in columns.values()]
        rows.append([setting, spread([r["accuracy"] for r in own]), *flatness])
    yield from table(["setting", "accuracy %", *columns], rows)


def settings_of(runs: Iterable[Record]) -> list[str]:
    """Return the settings there are."""
    return list(dict.fromkeys(r["setting"] for r in runs))


def growths(runs: Sequence[Record]) -> Iterator[str]:
    """Write how lengths and radii differ from SGD's in front of BatchNorm."""
    rows = []
    for setting in settings_of(runs):
        if found := growth(runs, setting):
            lengths, radii = zip(*found, strict=True)
            relative = [length * rho for length, rho in found]
            rows.append([setting, *map(_over_seeds, (lengths, [1 / x for x in lengths], radii, relative))])
    header = ["setting", "squared length", "effective learning rate", "expected rho", "rho times squared length"]
    yield from table(header, rows)


def _over_seeds(factors: Sequence[float]) -> str:
    return f"{geometric_mean(factors):.2f} ({min(factors):.2f} to {max(factors):.2f})"


# ---------------------------------------------------------------- what they say


def agreement_in_words(runs: Sequence[Record]) -> str:
    """Say how closely rho follows the curvature."""
    found = [layer for at in measurements(runs) for layer in at["layers"].values()]
    expected, sampled = (mean(0.2 <= w[kind] / w["ggn"] <= 5 for w in found) for kind in ("expected_rho", "rho"))
    last = sorted(w["rho"] / w["expected_rho"] for r in runs for w in r["measured"][-1]["layers"].values())
    return (
        f"Over {len(found)} measurements of layers, expected rho is within a factor of 5 of the GGN's top eigenvalue "
        f"in {expected:.0%}, rho itself in {sampled:.0%}. At the end of training rho is "
        f"{median(last):.2g} ({last[0]:.2g} to {last[-1]:.2g}) of expected rho. In the table ratios are medians with "
        "their range, correlations those of ranks."
    )


def growth_in_words(runs: Sequence[Record]) -> Iterator[str]:
    """Say which part of a change of rho is due to the length of the weights."""
    for setting in settings_of(runs):
        if found := growth(runs, setting):
            length, rho = (math.log(geometric_mean(factors)) for factors in zip(*found, strict=True))
            parts = f"{-length:+.2f} by the length, {rho + length:+.2f} beside it"
            yield f"- `{setting}`: log rho changes by {rho:+.2f}: {parts}."


# ---------------------------------------------------------------- pictures


def draw_layers(run: Record, path: Path, title: str) -> None:
    """Draw rho and the true curvature of each layer along one run."""
    names = list(run["measured"][0]["layers"])
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    epochs = [at["epoch"] for at in run["measured"]]
    for name, axes in zip(names, panels, strict=False):
        for kind, colour in COLOURS.items():
            style = ":" if kind == "rho" else "--" if kind == "hessian" else "-"
            axes.plot(epochs, [at["layers"][name][kind] for at in run["measured"]], style, color=colour)
        axes.set(title=name, xlabel="epoch", yscale="log")
        label_logarithmic(axes.yaxis)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    figure.legend(first.lines, list(LABELS.values()), loc="outside upper center", ncols=4, frameon=False)
    figure.supylabel(title)
    figure.savefig(path, dpi=110)


def draw_settings(runs: Sequence[Record], path: Path) -> None:
    """Draw the network's curvature by all measures along training, and the lengths of its scale-invariant weights."""
    invariant = runs[0]["invariant"]

    def average(at: Record, of: Callable[[Record], float]) -> float:
        return geometric_mean([of(at["layers"][name]) for name in invariant])

    panels: dict[str, Values] = {
        "expected rho, largest layer": largest_rho,
        "GGN, all parameters": lambda at: at["ggn"],
        "Hessian, all parameters": lambda at: at["hessian"],
        "sharpness": lambda at: at["sharpness"],
    }
    if invariant:
        panels |= {
            "squared length, in front of BatchNorm": lambda at: average(at, lambda w: w["squared_norm"]),
            "lr / squared length": lambda at: at["lr"] / average(at, lambda w: w["squared_norm"]),
            "expected rho": lambda at: average(at, lambda w: w["expected_rho"]),
            "expected rho |W|^2": lambda at: average(at, lambda w: w["expected_rho"] * w["squared_norm"]),
        }
    figure = Figure(figsize=(13, 3 * len(panels) / 4 + 0.5), layout="constrained")
    for axes, (title, of) in zip(figure.subplots(len(panels) // 4, 4, squeeze=False).flat, panels.items(), strict=True):
        for i, setting in enumerate(settings_of(runs)):
            own = [r["measured"] for r in runs if r["setting"] == setting]
            stops = [mean(of(at) for at in same) for same in zip(*own, strict=True)]
            axes.plot([at["epoch"] for at in own[0]], stops, color=f"C{i}", label=setting)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="epoch")
        if title != "sharpness":  # which may be negative
            axes.set_yscale("log")
            label_logarithmic(axes.yaxis)
    first = figure.axes[0]
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the page


def lines(records: Sequence[Record], pictures: Path) -> Iterator[str]:
    """Write the lines of the page, and draw its pictures."""
    yield from PREFACE.splitlines()
    for task, epochs in dict.fromkeys((r["task"], r["epochs"]) for r in records):
        runs = [r for r in records if (r["task"], r["epochs"]) == (task, epochs)]
        draw_layers(runs[0], pictures / f"{task}-layers.png", f"{task}, {runs[0]['setting']}")
        draw_settings(runs, pictures / f"{task}-settings.png")
        yield from ("", f"## {task}, {epochs} epochs", "", agreement_in_words(runs), "", *agreement(runs))
        yield from ("", f"![layers]({pictures.name}/{task}-layers.png)", "", "At the end of training:", "")
        yield from (*endings(runs), "", f"![settings]({pictures.name}/{task}-settings.png)")
        if runs[0]["invariant"]:
            yield from ("", "### Growing weights", "", *ABOUT_GROWTH.splitlines(), "", *growths(runs))
            yield from ("", *growth_in_words(runs))
        yield from ("", *(f"- {line}" for line in how_made(runs)))
