"""The tables and figures of the paper [Ebrahimi & Klabjan, arXiv 2111.08577], with the numbers of our own runs.

Written to ``docs/results/paper.md`` and ``docs/results/paper/`` from the runs of :mod:`benchmarks.accuracy` and
:mod:`benchmarks.inference`. Nothing is measured here and no number is typed by hand: run ``python -m benchmarks.paper``
again whenever there are more runs. What has not been run yet is listed at the end, with the command that does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from baselines.hybrid import Statistics, ThresholdPredictor, best_threshold
from benchmarks import inference
from benchmarks.accuracy import RESULTS
from benchmarks.commands import Parser
from benchmarks.methods import HYBRID
from benchmarks.records import Record, how_made, identity, one_line, read_records, spread
from benchmarks.report import (
    Setting,
    area,
    asked,
    draw,
    levels_of,
    matching,
    methods_of,
    read_all,
    settings,
    table,
    write_page,
)
from benchmarks.tasks import TASKS

TIMED = ("sgd", "taylor", "hgnp", "hybrid")
COMPARED = ("sgd", "hgnp", "hgnp-plain", "hybrid", "taylor", "eigendamage", "magnitude-l1", "apoz", "random", "snip")
ABLATION = ("hgnp", "penalty-in-theta-only", "penalty-in-training-only", "theta", "taylor")
RACED = ("hgnp", "taylor", "hybrid")  # areas are compared among these
PEERS = ("sam+taylor", "spectral-radius+taylor", "tp-group-taylor", "tp-group-magnitude", "tp-group-norm")
LEVELS, TIMES = (0.5, 0.75, 0.85, 0.9, 0.95), (2.1, 2.55, 5.0)  # shares of neurons, and how many times fewer MACs
TRAINING_IMAGES = {"digits": 1_347, "mnist": 60_000, "cifar10": 50_000, "cifar10-small": 10_000, "flowers": 2_040}

# ---------------------------------------------------------------- table 1: training time


def training_times(setting: Setting) -> Iterator[str]:
    """Write seconds of an epoch by method and sparsity, those of each device and number of threads for themselves."""
    rows = []
    for made in dict.fromkeys((r["hardware"], r["threads"]) for r in setting.runs):
        runs = [r for r in setting.runs if (r["hardware"], r["threads"]) == made and r["method"] in TIMED]
        for level in levels_of(runs):
            found = {m: [r["seconds"] / r["epochs"] for r in matching(runs, m, level)] for m in TIMED}
            cells = (f"{spread(v, '{:.3g}')} ({len(v)})" if (v := found[m]) else "" for m in TIMED)
            rows.append([f"{made[0]}, {made[1]} threads", asked(level, setting.budget), *cells])
    yield from table(["device", "sparsity", *TIMED], rows)


# ---------------------------------------------------------------- table 2: inference time


def inference_times(records: Sequence[Record]) -> Iterator[str]:
    """Write milliseconds of a call by device, task, sparsity and batch size."""
    rows = []
    for which in dict.fromkeys(identity(r, inference.SETTING) for r in records):
        own = [r for r in records if identity(r, inference.SETTING) == which]
        for size in own[0]["batch_sizes"].split():
            times = {
                n: [1000 * t for r in own for t in r["networks"][n]["latencies"][size]] for n in inference.NETWORKS
            }
            full = mean(times["full"])
            cells = (f"{spread(v, '{:.3g}')} ({full / mean(v):.2f}x)" for v in times.values())
            first = own[0]
            device = f"{first['hardware']}, {first['threads']} threads"
            rows.append([device, f"{first['task']}, {asked(first['sparsity'], 'neurons')}", size, *cells])
    yield from table(["device", "task", "images", "full ms", "neurons removed ms", "weights zero ms"], rows)


# ---------------------------------------------------------------- table 3: at equal accuracy


def level_at(levels: Sequence[float], accuracies: Sequence[float], accuracy: float) -> float | None:
    """Return the largest sparsity at which the polygon through these points still has this accuracy.

    Args:
        levels: Sparsities, ascending.
        accuracies: One for each.
        accuracy: That is asked for.

    Returns:
        A sparsity between the first and the last; None if the accuracy is reached nowhere.

    Example:
        >>> level_at([0.0, 0.5, 0.9], [99.0, 98.0, 90.0], 94.0)
        0.7
    """
    points = list(zip(levels, accuracies, strict=True))
    if accuracies[-1] >= accuracy:
        return levels[-1]
    for (a, x), (b, y) in reversed(list(pairwise(points))):
        if x >= accuracy > y:
            return a + (b - a) * (x - accuracy) / (x - y)
    return None


def at_equal_accuracy(setting: Setting, peer: str = "snip", method: str = "hgnp") -> Iterator[str]:
    """Write how large SNIP's networks are, and HGNP's where its mean accuracy comes down to the same."""
    levels = [level for level in levels_of(setting.runs) if matching(setting.runs, method, level)]
    curve = [mean(r["accuracy"] for r in matching(setting.runs, method, level)) for level in levels]
    rows = []
    for own in (matching(setting.runs, peer, level) for level in levels_of(setting.runs)):
        if not own or not levels:
            continue
        accuracy, dense = mean(r["accuracy"] for r in own), own[0]
        place = level_at(levels, curve, accuracy)
        kept = [r["nonzero"] for r in own if "nonzero" in r]
        theirs = [f"{accuracy:.2f}", f"{mean(kept) / dense['parameters']:.1%}" if kept else "", "100%"]
        ours = ["", "", ""]
        if place is not None:
            left = {
                name: np.interp(
                    place, levels, [mean(r[name] for r in matching(setting.runs, method, s)) for s in levels]
                )
                for name in ("parameters", "macs")
            }
            bound = "≥ " if place == levels[-1] else ""
            ours = [f"{bound}{place:.1%}", *(f"{left[name] / dense[name]:.1%}" for name in left)]
        rows.append([asked(own[0]["sparsity"], setting.budget), *theirs, *ours])
    header = [f"{peer} asked for", "accuracy %", "parameters not zero", "MACs"]
    yield from table([*header, f"{method} removes at the same accuracy", "parameters left", "MACs left"], rows)


# ---------------------------------------------------------------- table 4: areas and thresholds


def common_levels(setting: Setting, methods: Iterable[str]) -> list[float]:
    """Sparsities, dense not counted, at which all of these methods have runs."""
    return [s for s in levels_of(setting.runs) if s and all(matching(setting.runs, m, s) for m in methods)]


def areas(chosen: Sequence[Setting]) -> Iterator[str]:
    """Write areas under mean accuracy (%) over the sparsities that all have, and the thresholds of the hybrid."""
    known = {s.title: best for s in chosen if (best := known_threshold(s)) is not None}
    rows = []
    for setting in chosen:
        methods = [m for m in RACED if m in methods_of(setting.runs)]
        levels = common_levels(setting, methods)
        if len(levels) < 2 or "taylor" not in methods:
            continue
        found = {m: area(setting.runs, m, levels) for m in methods}
        cells = [
            f"{found[m]:.3f} ({100 * (found[m] / found['taylor'] - 1):+.2f}%)" if m in found else "" for m in RACED
        ]
        best, predicted = known.get(setting.title), predicted_threshold(setting, chosen, known)
        thresholds = ["" if value is None else f"{value:.3f}" for value in (best, predicted)]
        rows.append([setting.title, ", ".join(f"{s:g}" for s in levels), *cells, *thresholds])
    yield from table(["task", "sparsities", *RACED, "best threshold", "predicted threshold"], rows)


def known_threshold(setting: Setting) -> float | None:
    """Return the best threshold in hindsight, told from the runs of both pure methods; None below two sparsities."""
    levels = common_levels(setting, ("hgnp", "taylor"))
    if len(levels) < 2:
        return None
    accuracies = {m: [mean(r["accuracy"] for r in matching(setting.runs, m, s)) for s in levels] for m in RACED[:2]}
    return best_threshold([1 - s for s in levels], accuracies["taylor"], accuracies["hgnp"])


def predicted_threshold(setting: Setting, chosen: Sequence[Setting], known: Mapping[str, float]) -> float | None:
    """Return what a Lasso says that has learned from all other tasks; None where fewer than two are known."""
    others = [s for s in chosen if s.task != setting.task and s.title in known and s.task in TASKS]
    if len(others) < 2 or setting.task not in TASKS:
        return None
    predictor = ThresholdPredictor().fit([statistics(s.task) for s in others], [known[s.title] for s in others])
    return predictor.predict(statistics(setting.task))


def statistics(task: str) -> Statistics:
    """Return what is known of a task before anything is trained."""
    model = TASKS[task].network()
    classes = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][-1]
    data = task.split("-")[0]
    small = f"{data}-small"
    examples = TRAINING_IMAGES[small if task.endswith("-small") and small in TRAINING_IMAGES else data]
    return Statistics.of(model, classes=classes, examples=examples)


# ---------------------------------------------------------------- figures


def draw_ablation(setting: Setting, path: Path) -> None:
    """Draw bars of accuracy for each sparsity, with standard deviations."""
    methods = [m for m in ABLATION if m in methods_of(setting.runs)]
    levels = common_levels(setting, methods)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(methods):
        values = [[r["accuracy"] for r in matching(setting.runs, method, level)] for level in levels]
        errors = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        places = [place + i / (len(methods) + 1) for place in range(len(levels))]
        axes.bar(places, [mean(v) for v in values], 1 / (len(methods) + 1), yerr=errors, label=method, align="edge")
    middle = len(methods) / (len(methods) + 1) / 2
    axes.set_xticks([place + middle for place in range(len(levels))], [asked(s, setting.budget) for s in levels])
    low = min((r["accuracy"] for r in setting.runs if r["method"] in methods and r["sparsity"]), default=0.0)
    axes.set(ylabel="test accuracy, %", title=setting.title, ylim=(max(0.0, low - 5), None))
    axes.legend(frameon=False, ncols=3)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the page

PREFACE = f"""\
# The paper's tables and figures

Written by `python -m benchmarks.paper` from the runs of `python -m benchmarks.accuracy` and `python -m
benchmarks.inference`: the tables and figures of Ebrahimi & Klabjan, arXiv 2111.08577, with our own numbers on the tasks
that have been run; mean ± standard deviation (number of runs). Accuracy is that on test images after the last epoch.

- Table 1: seconds of an epoch by the clock, all of a run's epochs and removals counted. Where a machine had other work,
  as a wide spread tells, they compare little.
- Table 2: milliseconds of a call in eval mode, medians of repeated measurements in turn; how many times as fast as the
  full network. Weights that are zero are multiplied like others.
- Table 3: SNIP's networks, and HGNP's at the sparsity where the line through its mean accuracies comes down to SNIP's;
  ≥ where it is above it to the end. Shares are those of the dense network.
- Table 4: area under the polygon of mean accuracy (%) over the sparsities named, by trapezoids, and its difference to
  that of Taylor. Best threshold: share of the neurons left at which a hybrid of both pure methods' runs would have
  changed over, for the largest area; predicted: by a Lasso that learned from the best thresholds of all other tasks.
  The hybrid itself ran with the paper's {HYBRID["threshold"]}.
"""


def page(records: Sequence[Record], timings: Sequence[Record], pictures: Path) -> Iterator[str]:
    """Write the lines of the page, and draw its pictures."""
    chosen = list(settings(records))
    yield from PREFACE.splitlines()
    yield from ("", "## Table 1: training time")
    for setting in chosen:
        if set(TIMED) & set(methods_of(setting.runs)):
            yield from ("", setting.title, "", *training_times(setting))
    yield from ("", "## Table 2: inference time", "", *(inference_times(timings) if timings else [NO_TIMINGS]))
    yield from ("", "## Table 3: at equal accuracy")
    with_both = [setting for setting in chosen if {"snip", "hgnp"} <= set(methods_of(setting.runs))]
    if not with_both:
        yield from ("", NO_SNIP)
    for setting in with_both:
        yield from ("", setting.title, "", *at_equal_accuracy(setting))
    yield from ("", "## Table 4: areas and thresholds", "", *areas(chosen))
    yield from ("", "## Figures 1 to 4: accuracy against sparsity")
    for setting in chosen:
        own, picture = [r for r in setting.runs if r["method"] in COMPARED], pictures / f"curves-{setting.name}.png"
        if own:
            draw(own, picture, setting.title, setting.budget)
            yield from ("", f"![{setting.title}]({pictures.name}/{picture.name})")
    yield from ("", "## Figure 5: ablation")
    for setting in chosen:
        if common_levels(setting, ABLATION):
            picture = pictures / f"ablation-{setting.name}.png"
            draw_ablation(setting, picture)
            yield from ("", f"![{setting.title}]({pictures.name}/{picture.name})")
    yield from ("", "## Not run yet", "", NOT_RUN, "", *(f"- `{command}`" for command in missing(records)))
    yield from ("", "## How this was made", "", *(f"- {line}" for line in made_by(records, timings)))


NO_SNIP = "No task has been run by both yet: `python -m benchmarks.accuracy --method snip hgnp`."
NOT_RUN = """\
Of each command something is missing, a task, a method or a sparsity; what is there is not repeated. How many seeds
there are is not looked at."""
NO_TIMINGS = "Nothing has been timed yet: `python -m benchmarks.inference`."


def asked_for() -> dict[str, set[tuple[str, str, float]]]:
    """Methods, budgets and sparsities of the whole race, by the options that ask for them."""
    methods = tuple(dict.fromkeys((*COMPARED[1:], *ABLATION, *PEERS)))
    race = f"--method {' '.join(methods)}"
    return {
        "--method sgd --sparsity 0": {("sgd", "neurons", 0.0)},
        f"{race} --sparsity {' '.join(f'{level:g}' for level in LEVELS)}": {
            (method, "neurons", level) for method in methods for level in LEVELS
        },
        f"{race} --speedup {' '.join(f'{times:g}' for times in TIMES)}": {
            (method, "macs", 1 - 1 / times) for method in methods for times in TIMES
        },
    }


def missing(records: Sequence[Record]) -> Iterator[str]:
    """Write the commands of which not all has been run, for tasks that are run alike in one; large ones on a GPU."""
    alike: dict[str, list[str]] = {}
    for name, task in TASKS.items():
        large = name.startswith(("cifar10", "flowers")) and not name.endswith("-small")
        given = f" --pretrained {name.split('-')[1]}.pt" if task.pretrained else ""
        root = "" if name == "digits" else " --data-root DATA"
        options = f"{given}{root}{' --device cuda --amp bf16 --channels-last' if large else ''}"
        alike.setdefault(options, []).append(name)
    done: dict[str, set[tuple[str, str, float]]] = {name: set() for name in TASKS}
    for r in records:
        if r["task"] in TASKS and r["epochs"] == TASKS[r["task"]].epochs:
            done[r["task"]].add((r["method"], r["budget"], r["sparsity"]))
    for options, names in alike.items():
        for what, runs in asked_for().items():
            if left := [name for name in names if not runs <= done[name]]:
                yield f"python -m benchmarks.accuracy --task {' '.join(left)}{options} {what}"


def made_by(records: Sequence[Record], timings: Sequence[Record]) -> Iterator[str]:
    """Say under which circumstances the runs were made; their commands stand in the report of all runs."""
    for line in how_made([*records, *timings]):
        if not line.startswith("command: "):
            yield line


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("paper", "Turn runs into the paper's tables and figures.")
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder with runs of benchmarks.accuracy")
    parser.add_argument("--timings", type=Path, default=inference.RESULTS, help="and of benchmarks.inference")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for paper.md and paper/")
    options = parser.parse_args(arguments)
    timings = [record for file in sorted(options.timings.glob("*.jsonl")) for record in read_records(file)]
    records, written = read_all(options.runs), options.out / "paper.md"
    write_page(written, partial(page, records, timings))
    print(f"{one_line({'runs': len(records), 'timings': len(timings)})}: {written}")


if __name__ == "__main__":
    main()
