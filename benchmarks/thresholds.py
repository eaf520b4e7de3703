"""The hybrid's threshold, learned from our own runs: what a Lasso predicts for each task, beside what was best there.

For every setting in which both Taylor and HGNP ran at two sparsities or more (:mod:`benchmarks.accuracy`), the best
threshold is told in hindsight (:func:`baselines.hybrid.best_threshold`), and predicted by a
:class:`~baselines.hybrid.ThresholdPredictor` that has learned from all other tasks; beside it stands the mean of the
others, which a prediction is to be better than. Nothing is measured here: run ``python -m benchmarks.thresholds`` again
whenever there are more runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

from baselines.hybrid import Statistics, ThresholdPredictor
from benchmarks.accuracy import RESULTS
from benchmarks.commands import Parser
from benchmarks.paper import known_threshold, predicted_threshold, statistics
from benchmarks.records import Record
from benchmarks.report import Setting, read_all, settings, table
from benchmarks.tasks import TASKS

FEWEST = 3  # tasks: one that is predicted, and two that a Lasso can learn from


@dataclass(frozen=True)
class Comparison:
    """A setting's best threshold, and what is said of it by those of other tasks; None where these are too few."""

    setting: Setting
    observed: float
    predicted: float | None
    others: float | None


def comparisons(chosen: Sequence[Setting]) -> list[Comparison]:
    """Predict each known threshold from those of the other tasks."""
    usable = [s for s in chosen if s.task in TASKS]
    known = {s.title: best for s in usable if (best := known_threshold(s)) is not None}
    told = [s for s in usable if s.title in known]
    found = []
    for setting in told:
        others = [s for s in told if s.task != setting.task]
        enough = len({s.task for s in others}) >= FEWEST - 1
        predicted = predicted_threshold(setting, others, known) if enough else None
        average = mean(known[s.title] for s in others) if enough else None
        found.append(Comparison(setting, known[setting.title], predicted, average))
    return found


def lines(records: Sequence[Record]) -> Iterator[str]:
    """Write the table, the errors, and what the Lasso goes by, or that there are too few tasks."""
    found = comparisons(list(settings(records)))
    cells = ([c.setting.title, *map(_written, (c.observed, c.predicted, c.others))] for c in found)
    yield from table(["task", "best threshold", "predicted", "mean of the others"], cells)
    tasks, wanted = len({c.setting.task for c in found}), len(fields(Statistics)) + 1
    yield ""
    if tasks < FEWEST:
        yield f"Too few tasks to fit: {tasks} with a known threshold, of which one is predicted from the others;"
        yield f"at least {FEWEST} are needed, each with runs of both taylor and hgnp at two sparsities or more."
        return
    if tasks <= wanted:
        yield f"{tasks} tasks for {wanted} numbers that are fitted: no evidence of what the statistics are worth."
    of_lasso = mean(abs(c.predicted - c.observed) for c in found if c.predicted is not None)
    of_mean = mean(abs(c.others - c.observed) for c in found if c.others is not None)
    yield f"Mean error of the predictions {of_lasso:.3f}, of the mean of the others {of_mean:.3f}."
    predictor = ThresholdPredictor().fit([statistics(c.setting.task) for c in found], [c.observed for c in found])
    weights = ", ".join(f"{name} {weight:+.3f}" for name, weight in predictor.weights().items())
    yield f"Learned from all of them, per standard deviation of the logarithms: {weights or 'no statistic counts'}."


def _written(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("thresholds", "Predict the hybrid's threshold from our own runs.")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder with TASK.jsonl of benchmarks.accuracy")
    options = parser.parse_args(arguments)
    print("\n".join(lines(read_all(options.runs))))


if __name__ == "__main__":
    main()
