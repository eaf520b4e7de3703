"""Tables and pictures of all runs that :mod:`benchmarks.accuracy` has made.

Written to ``docs/results/``: ``accuracy.md``, and for each setting a picture in ``accuracy/``. Nothing is measured here
and no number is typed by hand: run ``python -m benchmarks.report`` again whenever there are more runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, LogLocator, NullFormatter

from baselines.hybrid import area as polygon_area
from benchmarks.accuracy import MEASURED, RESULTS, TOLERATED
from benchmarks.commands import Parser
from benchmarks.methods import METHODS
from benchmarks.records import Record, how_made, identity, read_records, spread

REFERENCE = "taylor"  # what areas are compared with, as in the paper's Table 4
COLUMNS: dict[str, Callable[[Record], float]] = {  # what else is told of runs, and how it is counted
    "neurons": lambda r: r["neurons"],
    "parameters": lambda r: r["parameters"],
    "MACs": lambda r: r["macs"],
    "latency ms": lambda r: 1000 * r["latency"],
    "training s": lambda r: r["seconds"],
    "rho": lambda r: r["rho"],
    "sharpness": lambda r: r["sharpness"],
}
PREFACE = f"""\
# Accuracy against sparsity

Written by `python -m benchmarks.report` from the runs of `python -m benchmarks.accuracy`.

- Accuracy: on the test images after the last epoch, in %, mean ± standard deviation (number of seeds); the highest mean
  is in bold.
- Columns say what was asked for; † marks where more than {TOLERATED:.0%} less went, which is compared with nothing.
  EigenDamage, weight pruning and SNIP are asked for as many parameters as go when every layer loses that share of its
  neurons; where the budget is MACs, EigenDamage is asked for these like all others. "neurons" below are output
  channels, those of projections among them, and "parameters" count zeros.
- Pictures: on the left at even distances, without what is marked †.
- Area: under accuracy against sparsity, how much larger than that of {REFERENCE}, at the sparsities that both have.
- HGNP: hgnp is as it is by default, hgnp-plain the paper's; hgnp-flat at every step with mu = 0.03, hgnp-flat-0.1 with
  0.1, hgnp-flat-sixteenth with 0.03 on a sixteenth of each batch, hgnp-every-step that by the batch's own labels;
  hgnp-thorough by these on whole batches, linear in the sum over layers, mu = 0.1. theta is its scores without a
  penalty.
- Latency: of one call on {MEASURED} test images, on which rho is measured as well.
- Sharpness: mean rise of the training loss when all weights of layers are multiplied by 1 plus normal noise of 0.1.
"""
STYLES = ("-", "--", ":", "-.")

# ---------------------------------------------------------------- what belongs together

SETTING = ("task", "epochs", "budget", "amp", "pretrained")


@dataclass(frozen=True)
class Setting:
    """Runs that can be compared with each other: of one task, as long, to the same budget, computed alike.

    Attributes:
        task: What was trained.
        budget: What sparsities are shares of.
        title: All that these runs have in common.
        name: The same in the name of a file.
        runs: Theirs; dense networks are there for every budget.
    """

    task: str
    budget: str
    title: str
    name: str
    runs: list[Record]


def settings(records: Sequence[Record]) -> Iterator[Setting]:
    """Put together what can be compared, in the order in which it comes."""
    for common in dict.fromkeys(identity(r, SETTING) for r in records):
        task, epochs, budget, amp, pretrained = common
        known = (task, epochs, "neurons", amp, pretrained)
        own = [
            r
            for r in records
            if identity(r, SETTING) == common or (identity(r, SETTING) == known and not r["sparsity"])
        ]
        rest = [*(["MACs"] if budget == "macs" else []), *filter(None, (amp, pretrained))]
        yield Setting(
            task, budget, ", ".join([task, f"{epochs} epochs", *rest]), "-".join([task, str(epochs), *rest]), own
        )


def asked(level: float, budget: str) -> str:
    """Say what was asked for."""
    if not level:
        return "dense"
    return f"{level:.0%} removed" if budget == "neurons" else f"{1 / (1 - level):.3g}x fewer MACs"


# ---------------------------------------------------------------- numbers


def methods_of(runs: Iterable[Record]) -> list[str]:
    """Return the methods there are, in the order in which they are listed."""
    there = {r["method"] for r in runs}
    return [name for name in METHODS if name in there] + sorted(there - METHODS.keys())


def levels_of(runs: Iterable[Record]) -> list[float]:
    """Return the sparsities there are, ascending."""
    return sorted({r["sparsity"] for r in runs})


def matching(runs: Iterable[Record], method: str, sparsity: float) -> list[Record]:
    """Return a method's runs at one sparsity."""
    return [r for r in runs if (r["method"], r["sparsity"]) == (method, sparsity)]


def reached(runs: Iterable[Record], method: str, sparsity: float) -> bool:
    """Tell whether there are a method's runs at this sparsity, and none of them fell short of it."""
    own = matching(runs, method, sparsity)
    return bool(own) and all(r.get("missed", 0.0) <= TOLERATED for r in own)


def area(runs: Sequence[Record], method: str, levels: Sequence[float]) -> float:
    """Area under the polygon of mean accuracy (%) over sparsity, from the first of these levels to the last."""
    return polygon_area(levels, [mean(r["accuracy"] for r in matching(runs, method, level)) for level in levels])


def gain(runs: Sequence[Record], method: str) -> float | None:
    """Gain in area (%) over the reference, at the sparsities that both have; None below two of them."""
    levels = [s for s in levels_of(runs) if s and all(reached(runs, m, s) for m in (method, REFERENCE))]
    if len(levels) < 2:
        return None
    return 100 * (area(runs, method, levels) / area(runs, REFERENCE, levels) - 1)


# ---------------------------------------------------------------- tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Write a table in Markdown."""
    for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        yield f"| {' | '.join(row)} |"


def accuracies(runs: Sequence[Record], budget: str = "neurons") -> Iterator[str]:
    """Write accuracy by method and sparsity, best means in bold."""
    levels, methods = levels_of(runs), methods_of(runs)
    found = {(m, s): [r["accuracy"] for r in matching(runs, m, s)] for m in methods for s in levels}
    best = {s: max((mean(found[m, s]) for m in methods if reached(runs, m, s)), default=None) for s in levels}

    def cell(method: str, level: float) -> str:
        values = found[method, level]
        if not values:
            return ""
        written = f"{spread(values)} ({len(values)})"
        if not reached(runs, method, level):
            return f"{written} †"
        return f"**{written}**" if mean(values) == best[level] else written

    def gained(method: str) -> str:
        found = gain(runs, method)
        return "" if found is None else f"{found:+.2f}"

    header = ["method", *(asked(s, budget) for s in levels), f"area vs {REFERENCE} %"]
    yield from table(header, ([m, *(cell(m, s) for s in levels), gained(m)] for m in methods))


def sizes(runs: Sequence[Record], level: float) -> Iterator[str]:
    """Write means of all else, at one sparsity."""
    own = {m: found for m in methods_of(runs) if (found := matching(runs, m, level))}
    rows = ([m, *(_short(mean(map(of, found))) for of in COLUMNS.values())] for m, found in own.items())
    yield from table(["method", *COLUMNS], rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- pictures


def draw(runs: Sequence[Record], path: Path, title: str, budget: str = "neurons") -> None:
    """Draw accuracy against what was asked for, at even distances, and against the MACs that are left.

    What was never pruned is a line across, and one point more.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    levels = list(filter(None, levels_of(runs)))
    for i, method in enumerate(methods_of(runs)):
        groups = [matching(runs, method, level) for level in levels]
        line = {"label": method, "color": f"C{i % 10}", "linestyle": STYLES[i // 10 % len(STYLES)]}
        if dense := matching(runs, method, 0):
            left.axhline(mean(r["accuracy"] for r in dense), linewidth=0.8, **(line | {"label": f"{method}, dense"}))
            _curve(right, [(mean(r["macs"] for r in dense), dense)], line)
        if any(groups):
            _curve(left, [(i, g) for i, g in enumerate(groups) if g and reached(g, method, levels[i])], line)
            _curve(right, [(mean(r["macs"] for r in g), g) for g in groups if g], line)
    what = "neurons removed" if budget == "neurons" else "fewer MACs"
    left.set(xlabel=what, ylabel="test accuracy after the last epoch, %", title=title)
    left.set_xticks(range(len(levels)), [asked(level, budget).split()[0] for level in levels])
    right.set(xlabel="MACs left, for one image", xscale="log")
    label_logarithmic(right.xaxis, EngFormatter(sep=""))
    right.invert_xaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def label_logarithmic(axis: Axis, formatter: Formatter | str = "{x:g}") -> None:
    """Write numbers, not powers of ten, at a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(NullFormatter())


def _curve(axes: Axes, points: Sequence[tuple[float, Sequence[Record]]], line: dict[str, str]) -> None:
    """Draw means with standard deviations."""
    values = [[r["accuracy"] for r in runs] for _, runs in points]
    errors = [stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.errorbar([x for x, _ in points], [mean(v) for v in values], errors, marker="o", markersize=3, **line)


# ---------------------------------------------------------------- the command


def report(records: Sequence[Record], pictures: Path) -> Iterator[str]:
    """Write the lines of the report, and draw its pictures."""
    yield from PREFACE.splitlines()
    for setting in settings(records):
        picture = pictures / f"{setting.name}.png"
        draw(setting.runs, picture, setting.title, setting.budget)
        yield from ("", f"## {setting.title}", "", *accuracies(setting.runs, setting.budget))
        yield from ("", f"![{setting.task}]({pictures.name}/{picture.name})")
        for level in levels_of(setting.runs):
            yield from ("", asked(level, setting.budget).capitalize(), "", *sizes(setting.runs, level))
        yield from ("", *(f"- {line}" for line in how_made(setting.runs)))


def write_page(page: Path, lines: Callable[[Path], Iterable[str]]) -> None:
    """Write a page, whose pictures go into a folder of its name."""
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines(pictures)) + "\n")


def read_all(folder: Path) -> list[Record]:
    """Read the runs of all tasks.

    Raises:
        SystemExit: if there are none.
    """
    records = [record for file in sorted(folder.glob("*.jsonl")) for record in read_records(file)]
    if not records:
        raise SystemExit(f"{folder} holds no runs yet: make some with python -m benchmarks.accuracy")
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("report", "Turn the runs of benchmarks.accuracy into tables and pictures.")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder with TASK.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for accuracy.md and accuracy/")
    options = parser.parse_args(arguments)
    records = read_all(options.runs)
    page = options.out / "accuracy.md"
    write_page(page, partial(report, records))
    print(f"{len(records)} runs: {page}")


if __name__ == "__main__":
    main()
