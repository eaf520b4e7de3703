"""The tables in the README's results, from all runs of :mod:`benchmarks.accuracy` and :mod:`benchmarks.flatness`.

``python -m benchmarks.readme`` writes each table between its marks, ``<!-- race -->`` and ``<!-- /race -->`` for one.
No number in them is typed by hand, and a test sees that they are those of the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks import accuracy, flatness, report
from benchmarks.commands import Parser
from benchmarks.records import Record, spread
from benchmarks.tasks import TASKS

PAGE = Path("README.md")

# ---------------------------------------------------------------- accuracy

METHODS = {
    "hgnp": "HGNP",
    "hgnp-thorough": "HGNP, thorough",
    "hgnp-flat-sixteenth": "HGNP, flat",
    "theta": "no penalty",
    "taylor": "Taylor",
    "sam+taylor": "SAM + Taylor",
    "magnitude-l1": "L1",
    "tp-group-norm": "GroupNorm",
}
LEVELS = {"neurons": (0.5, 0.75, 0.9, 0.95), "macs": (0.8, 0.98)}
NAMES = {
    "digits": "digits",
    "mnist-mlp": "MNIST, MLP",
    "mnist-lenet5-few": "1,024 of MNIST, LeNet-5",
    "cifar10-vgg16bn-small": "CIFAR-10, VGG-16",
    "cifar10-resnet18-small": "CIFAR-10, ResNet-18",
    "flowers-alexnet-small": "Flowers-102, AlexNet",
}


def race(records: Sequence[Record]) -> Iterator[str]:
    """Write accuracy by task and by what was removed, trained for as long as tasks are; best means in bold."""
    settings = [s for s in report.settings(records) if s.task in NAMES and is_usual(s.runs[0])]
    header = ["last-epoch test accuracy, %", *METHODS.values(), "seeds"]
    rows = (
        place(setting, level)
        for setting in sorted(settings, key=lambda s: list(NAMES).index(s.task))
        for level in LEVELS[setting.budget]
        if report.matching(setting.runs, "hgnp", level)
    )
    yield from report.table(header, rows)


def is_usual(run: Record) -> bool:
    """Tell whether a run is as long as its task is by itself."""
    return bool(run["epochs"] == TASKS[run["task"]].epochs)


def place(setting: report.Setting, level: float) -> list[str]:
    """Write a row: one task with one share of the budget removed."""
    found = {m: [r["accuracy"] for r in report.matching(setting.runs, m, level)] for m in METHODS}
    best = max(mean(values) for m, values in found.items() if report.reached(setting.runs, m, level))
    cells = (bold_if(spread(v, "{:.1f}"), mean(v) == best) if v else "" for v in found.values())
    counts = sorted({len(values) for values in found.values() if values})
    what = report.asked(level, setting.budget).replace(" removed", "").replace("fewer ", "")
    return [f"{NAMES[setting.task]}, {what}", *cells, " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))]


def bold_if(written: str, best: bool) -> str:
    """Write in bold what is best."""
    return f"**{written}**" if best else written


# ---------------------------------------------------------------- flatness

TRAINED_BY = {
    "theta": "SGD",
    "sam": "SAM, distance 0.05",
    "hgnp": "`FlatKFAC`, the default",
    "hgnp-flat-sixteenth": "`every=1, mu=0.03, batch_fraction=1/16`",
    "hgnp-flat": "`every=1, mu=0.03`",
}
DIGITS = {"digits": ("digits", 0.0), "digits 75%": ("digits", 0.75)}
Measure = tuple[str, Callable[[Record], float], str, dict[str, tuple[str, float]]]  # its name, what, its form, where
MEASURES: tuple[Measure, ...] = (
    ("Hessian", lambda r: r["hessian"], "{:.2f}", {**DIGITS, "MNIST MLP": ("mnist-mlp", 0.0)}),
    ("noise 0.4", lambda r: r["accuracy_under_noise"]["0.4"], "{:.0f}", DIGITS),
)


def flat(records: Sequence[Record]) -> Iterator[str]:
    """Write the Hessian's top eigenvalue, and accuracy under noise, by what networks are trained with."""
    header = ["trained by", *(f"{what}, {place}" for what, *_, there in MEASURES for place in there)]

    def cells(method: str) -> Iterator[str]:
        for _, value, form, there in MEASURES:
            for task, level in there.values():
                own = [r for r in report.matching(records, method, level) if r["task"] == task]
                yield spread([value(r) for r in own], form)

    yield from report.table(header, ([label, *cells(method)] for method, label in TRAINED_BY.items()))


# ---------------------------------------------------------------- the command


def written(text: str, tables: Mapping[str, Iterable[str]]) -> str:
    """Put tables between their marks.

    Raises:
        SystemExit: if marks are missing.

    Example:
        >>> print(written("<!-- a -->old<!-- /a -->", {"a": ["| new |"]}))
        <!-- a -->
        <BLANKLINE>
        | new |
        <BLANKLINE>
        <!-- /a -->
    """
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        _, there, after = rest.partition(end)
        if not there:
            raise SystemExit(f"the page lacks {begin} with {end} behind it")
        text = "\n".join((before + begin, "", *lines, "", end + after))
    return text


def tables(runs: Path = accuracy.RESULTS, minima: Path = flatness.RESULTS) -> dict[str, Iterable[str]]:
    """Make all tables from the runs that are there."""
    return {"race": race(report.read_all(runs)), "flat": flat(report.read_all(minima))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("readme", "Write the tables of the README's results from the runs there are.")
    parser.add_argument("--page", type=Path, default=PAGE, help="what holds the marks")
    page = parser.parse_args(arguments).page
    page.write_text(written(page.read_text("utf-8"), tables()), "utf-8")


if __name__ == "__main__":
    main()
