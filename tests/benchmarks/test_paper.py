"""python -m benchmarks.paper: tables follow from the runs, areas and equal accuracy are what they are called."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from baselines.hybrid import Statistics
from benchmarks import accuracy, paper, report
from benchmarks.records import Record
from benchmarks.tasks import TASKS
from tests.benchmarks.test_report import CIRCUMSTANCES, rows

LARGE = {name for name in TASKS if name[:5] in ("cifar", "flowe") and not name.endswith("-small")}
LEVELS = (0.5, 0.75, 0.9)
CURVES = {  # mean accuracy at each of the levels
    "hgnp": (98.0, 95.0, 89.0),
    "taylor": (98.5, 94.0, 80.2),
    "hybrid": (98.5, 95.0, 89.5),
    "theta": (97.0, 94.0, 88.0),
    "penalty-in-theta-only": (97.0, 94.0, 88.0),
    "penalty-in-training-only": (97.0, 94.0, 88.0),
}


def record(task: str, method: str, sparsity: float, seed: int, accuracy: float, **others: Any) -> dict[str, Any]:
    """A run whose network lost as many parameters as the square of its width."""
    left = (1 - sparsity) ** 2
    return {
        "task": task,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": 10,
        "accuracy": accuracy,
        "seconds": 20.0,
        "parameters": 1000 * left,
        "macs": 4000 * left,
        "neurons": 100 * (1 - sparsity),
        "latency": 0.001,
        "rho": 1.0,
        "sharpness": 0.1,
        "missed": 0.0,
        **CIRCUMSTANCES,
        **others,
    }


def runs(task: str = "digits", shift: float = 0.0) -> list[dict[str, Any]]:
    """Two runs of each method at each level, one percent of accuracy above the mean and one below."""
    found = [
        record(task, method, level, seed, accuracy + shift * (method == "hgnp") + (1, -1)[seed])
        for method, curve in CURVES.items()
        for level, accuracy in zip(LEVELS, curve, strict=True)
        for seed in (0, 1)
    ]
    dense = [record(task, "sgd", 0.0, 0, 99.0, seconds=10.0), record(task, "hgnp", 0.0, 0, 99.0, seconds=12.0)]
    snip = record(task, "snip", 0.9, 0, 92.0, parameters=1000, macs=4000, nonzero=150)
    return [*dense, *found, snip]


@pytest.fixture
def setting() -> report.Setting:
    (found,) = report.settings(runs())
    return found


# ---------------------------------------------------------------- areas


@given(
    st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6, unique=True),
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
)
def test_the_area_is_the_integral_of_the_polygon_through_the_mean_accuracies(
    levels: list[float], accuracies: list[float]
) -> None:
    levels = sorted(levels)
    points = list(zip(levels, accuracies, strict=False))
    own = [record("t", "m", level, seed, a + (2, -2)[seed]) for level, a in points for seed in (0, 1)]
    expected = sum(  # Simpson's rule is exact for straight lines
        (b - a) / 6 * (x + 4 * (x + y) / 2 + y) for (a, x), (b, y) in pairwise(points)
    )
    assert report.area(own, "m", levels) == pytest.approx(expected, abs=1e-9)


def test_areas_are_those_over_the_levels_that_all_have_beside_the_thresholds(setting: report.Setting) -> None:
    (row,) = list(rows(list(paper.areas([setting]))).values())[2:]
    taylor = 0.25 * (98.5 + 94) / 2 + 0.15 * (94 + 80.2) / 2
    hgnp = 0.25 * (98 + 95) / 2 + 0.15 * (95 + 89) / 2
    assert row[0] == "0.5, 0.75, 0.9"
    assert row[1] == f"{hgnp:.3f} ({100 * (hgnp / taylor - 1):+.2f}%)"
    assert row[2] == f"{taylor:.3f} (+0.00%)"
    # Taylor is better with half of the neurons only: a hybrid would change over between a half and a quarter.
    assert row[4:] == [f"{(0.5 + 0.25) / 2:.3f}", ""]
    dense = [record("digits", method, 0.0, 0, 99.0) for method in ("taylor", "hybrid")]
    (with_dense,) = report.settings([*runs(), *dense])
    assert list(paper.areas([with_dense])) == list(paper.areas([setting])), "dense networks are no part of an area"


def test_a_threshold_is_predicted_from_the_other_tasks_alone() -> None:
    chosen = list(report.settings([*runs("digits"), *runs("mnist-mlp", shift=2), *runs("mnist-lenet5", shift=2)]))
    known = {s.title: best for s in chosen if (best := paper.known_threshold(s)) is not None}
    assert list(known.values()) == [0.375, 1.0, 1.0]
    assert paper.predicted_threshold(chosen[0], chosen, known) == pytest.approx(1.0, abs=0.01)
    with_others = paper.predicted_threshold(chosen[1], chosen, known)
    assert with_others is not None
    assert 0.3 < with_others < 1.0, "one of the others has a threshold of 0.375"
    assert paper.predicted_threshold(chosen[0], chosen[:2], known) is None


def test_statistics_are_those_of_the_tasks() -> None:
    assert paper.statistics("mnist-mlp") == Statistics(10, 60_000, 266_610, 3)
    assert paper.statistics("flowers-resnet18-small").classes == 102
    assert paper.statistics("cifar10-resnet18-small").examples == 10_000
    assert paper.statistics("flowers-resnet18-small").examples == 2_040
    train, _ = TASKS["digits"].load(None)
    assert paper.statistics("digits").examples == len(train.labels)


# ---------------------------------------------------------------- at equal accuracy


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.floats(0, 100))
def test_the_level_of_an_accuracy_is_the_last_place_where_the_polygon_has_it(
    accuracies: list[float], accuracy: float
) -> None:
    levels = [i / len(accuracies) for i in range(len(accuracies))]
    found = paper.level_at(levels, accuracies, accuracy)
    fine = np.union1d(np.linspace(levels[0], levels[-1], 2001), levels)
    above = fine[np.interp(fine, levels, accuracies) >= accuracy]
    if found is None:
        assert not len(above)
    else:
        assert np.interp(found, levels, accuracies) >= accuracy - 1e-6
        assert not len(above) or found >= above[-1] - 1e-9
        assert not len(above) or found <= above[-1] + levels[-1] / 2000 + 1e-9


def test_at_equal_accuracy_networks_are_compared_by_what_is_left_of_them(setting: report.Setting) -> None:
    table = rows(list(paper.at_equal_accuracy(setting)))
    place = 0.75 + 0.15 * (95 - 92) / (95 - 89)
    left = np.interp(place, (0.75, 0.9), (0.25**2, 0.1**2))
    assert table["90% removed"] == ["92.00", "15.0%", "100%", f"{place:.1%}", f"{left:.1%}", f"{left:.1%}"]


def test_where_the_other_method_is_never_as_bad_a_bound_is_told() -> None:
    worse = record("digits", "snip", 0.95, 0, 84.0, parameters=1000, macs=4000, nonzero=100)
    others = [worse, worse | {"seed": 1, "accuracy": 86.0}, record("digits", "random", 0.99, 0, 10.0)]
    (setting,) = report.settings([*runs(), *others])
    table = rows(list(paper.at_equal_accuracy(setting)))
    assert table["95% removed"] == ["85.00", "10.0%", "100%", "≥ 90.0%", "1.0%", "1.0%"]
    assert "≥" not in table["90% removed"][3]


def test_earlier_runs_that_did_not_count_zeros_leave_a_gap(setting: report.Setting) -> None:
    for run in setting.runs:
        run.pop("nonzero", None)
    assert rows(list(paper.at_equal_accuracy(setting)))["90% removed"][1] == ""


# ---------------------------------------------------------------- times


def test_training_times_are_seconds_of_an_epoch_for_each_device() -> None:
    other = [r | {"hardware": "GPU", "seconds": 5.0} for r in runs() if r["method"] == "hgnp"]
    other.append(record("digits", "random", 0.25, 0, 90.0))  # not one of those that are timed
    (setting,) = report.settings([*runs(), *other])
    lines = [line for line in paper.training_times(setting) if "dense" in line]
    assert lines[0] == "| h, 1 threads | dense | 1 (1) |  | 1.2 (1) |  |"
    assert lines[1] == "| GPU, 1 threads | dense |  |  | 0.5 (1) |  |"
    assert not any("25% removed" in line for line in paper.training_times(setting))


def timing(seed: int) -> dict[str, Any]:
    networks = {
        name: {"latencies": {"1": [0.001 * factor, 0.003 * factor], "16": [0.01 * factor] * 2}}
        for name, factor in (("full", 1.0), ("neurons", 0.5), ("weights", 2.0))
    }
    which = {"task": "digits", "sparsity": 0.75, "seed": seed, "epochs": 2, "batch_sizes": "1 16", "accuracy": 90.0}
    return {**which, "seconds": 3.0, "networks": networks, **CIRCUMSTANCES}


def test_inference_times_are_means_over_turns_and_seeds_beside_the_full_network() -> None:
    lines = list(paper.inference_times([timing(0), timing(1)]))[2:]
    deviation = "1.15"  # of 1, 3, 1, 3
    assert lines[0].startswith(
        f"| h, 1 threads | digits, 75% removed | 1 | 2 ± {deviation} (1.00x) | 1 ± 0.577 (2.00x) |"
    )
    assert lines[1].split("|")[3:6] == [" 16 ", " 10 ± 0 (1.00x) ", " 5 ± 0 (2.00x) "]


# ---------------------------------------------------------------- figures


def test_the_ablation_has_bars_of_mean_accuracy_with_deviations_where_all_have_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (setting,) = report.settings([*runs(), record("digits", "hgnp", 0.95, 0, 50.0)])
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    paper.draw_ablation(setting, tmp_path / "ablation.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50% removed", "75% removed", "90% removed"]
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    assert {b.get_label(): [bar.get_height() for bar in b] for b in bars} == {
        method: list(CURVES[method]) for method in CURVES if method != "hybrid"
    }
    for own in bars:
        assert own.errorbar is not None
        (lines,) = own.errorbar.lines[2]
        lengths = [float(top[1] - bottom[1]) / 2 for bottom, top in lines.get_segments()]
        assert lengths == pytest.approx([2**0.5] * 3), "of one above and one below the mean"


# ---------------------------------------------------------------- the page


def test_the_page_holds_all_tables_and_figures_and_what_has_not_been_run(tmp_path: Path) -> None:
    folder, timings = tmp_path / "runs", tmp_path / "timings"
    folder.mkdir()
    macs = [r | {"budget": "macs", "sparsity": 1 - 1 / 2.1} for r in runs() if r["sparsity"] == 0.5]
    (folder / "digits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*runs(), *macs]))
    usual = ["--runs", str(folder), "--timings", str(timings), "--out", str(tmp_path)]
    paper.main(usual)
    text = (tmp_path / "paper.md").read_text()
    for heading in ("Table 1", "Table 2", "Table 3", "Table 4", "Figures 1 to 4", "Figure 5", "Not run yet"):
        assert f"## {heading}" in text
    assert "Nothing has been timed yet" in text
    assert "2.1x fewer MACs" in text
    for name in ("curves-digits-10", "curves-digits-10-MACs", "ablation-digits-10", "ablation-digits-10-MACs"):
        assert f"(paper/{name}.png)" in text
        assert (tmp_path / "paper" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    commands = [line for line in text.split("## Not run yet")[1].splitlines() if line.startswith("- `python")]
    for task in TASKS:  # none has been run for as long as it is by itself
        own = [command for command in commands if f" {task} " in command]
        assert len(own) == 3
        assert [" --device cuda " in command for command in own] == [task in LARGE] * 3
        assert [" --pretrained " in command for command in own] == [TASKS[task].pretrained] * 3
    timings.mkdir()
    (timings / "digits.jsonl").write_text(json.dumps(timing(0)) + "\n")
    paper.main(usual)
    assert "| digits, 75% removed | 16 |" in (tmp_path / "paper.md").read_text()


@pytest.mark.parametrize("task", ["digits", "cifar10-resnet56"])
def test_a_command_is_listed_until_all_of_its_runs_are_there(task: str) -> None:
    def listed(records: list[Record]) -> list[str]:
        return [command for command in paper.missing(records) if f" {task} " in command]

    commands, records = listed([]), []
    assert len(commands) == 3
    assert all((" --data-root " in command) == (task != "digits") for command in commands)
    for left in (2, 1, 0):
        words = shlex.split(listed(records)[0].replace("cuda", "cpu"))[3:]
        own = [r for r in accuracy.planned(accuracy.parse(words)) if r["task"] == task]
        assert len(listed([*records, *(r | {"epochs": 1} for r in own)])) == left + 1
        assert len(listed([*records, *(r for r in own if r["method"] != own[0]["method"])])) == left + 1
        records += own
        assert len(listed(records)) == left


def test_runs_of_a_task_that_is_no_more_are_passed_over() -> None:
    old = {"task": "gone", "method": "sgd", "budget": "neurons", "sparsity": 0.0, "epochs": 3}
    assert list(paper.missing([old])) == list(paper.missing([]))


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs yet"):
        paper.main(["--runs", str(tmp_path), "--out", str(tmp_path)])
