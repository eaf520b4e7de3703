"""python -m benchmarks.thresholds: predictions stand beside what was best, and nothing is claimed of too few tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from baselines.hybrid import ThresholdPredictor
from benchmarks import thresholds
from benchmarks.paper import statistics
from benchmarks.report import settings
from tests.benchmarks.test_paper import record
from tests.benchmarks.test_report import rows

LEVELS = (0.2, 0.4, 0.6, 0.8)
SWITCHES = {"digits": 1, "mnist-mlp": 2, "mnist-lenet5": 3, "cifar10-vgg16bn-small": 2}


def runs(switches: Mapping[str, int]) -> list[dict[str, Any]]:
    """Made-up runs in which Taylor is ahead at the first so many levels, and HGNP at the others."""
    return [
        record(task, method, level, 0, 90.0 + ((method == "taylor") == (i < first)))
        for task, first in switches.items()
        for method in ("taylor", "hgnp")
        for i, level in enumerate(LEVELS)
    ]


def shown(capsys: Any, folder: Path, records: list[dict[str, Any]]) -> str:
    (folder / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    thresholds.main(["--runs", str(folder)])
    return str(capsys.readouterr().out)


def test_each_threshold_is_predicted_from_the_other_tasks_beside_what_was_best(tmp_path: Path, capsys: Any) -> None:
    text = shown(capsys, tmp_path, runs(SWITCHES))
    # HGNP overtakes between two levels: the middle between the shares of the neurons that they leave.
    best = {task: 1 - (LEVELS[first - 1] + LEVELS[first]) / 2 for task, first in SWITCHES.items()}
    found = rows([line for line in text.splitlines() if line.startswith("|")])
    errors = []
    for task, threshold in best.items():
        others = [other for other in best if other != task]
        fitted = ThresholdPredictor().fit([statistics(o) for o in others], [best[o] for o in others])
        expected = fitted.predict(statistics(task))
        average = mean(best[o] for o in others)
        assert found[f"{task}, 10 epochs"] == [f"{value:.3f}" for value in (threshold, expected, average)]
        errors.append((abs(expected - threshold), abs(average - threshold)))
    assert (
        "Mean error of the predictions {:.3f}, of the mean of the others {:.3f}.".format(
            *map(mean, zip(*errors, strict=True))
        )
        in text
    )
    assert "4 tasks for 5 numbers that are fitted: no evidence" in text
    assert "Too few" not in text


@pytest.mark.parametrize("count", [1, 2])
def test_of_too_few_tasks_it_is_said_that_nothing_can_be_fitted(count: int, tmp_path: Path, capsys: Any) -> None:
    text = shown(capsys, tmp_path, runs(dict(list(SWITCHES.items())[:count])))
    assert f"Too few tasks to fit: {count} with a known threshold" in text
    assert "Mean error" not in text
    found = rows([line for line in text.splitlines() if line.startswith("|")])
    assert found["digits, 10 epochs"] == ["0.700", "", ""]


def test_tasks_that_only_one_of_both_methods_has_run_do_not_count(tmp_path: Path, capsys: Any) -> None:
    lacking = [r for r in runs(SWITCHES) if r["task"] in ("digits", "mnist-mlp") or r["method"] == "hgnp"]
    assert "Too few tasks to fit: 2 " in shown(capsys, tmp_path, lacking)


def test_two_budgets_of_a_task_are_no_two_tasks() -> None:
    both = [*runs({"digits": 1, "mnist-mlp": 2}), *(r | {"budget": "macs"} for r in runs({"digits": 2}))]
    found = thresholds.comparisons(list(settings(both)))
    assert [c.observed for c in found] == pytest.approx([0.7, 0.5, 0.5])
    assert all(c.predicted is c.others is None for c in found)
    assert "Too few tasks to fit: 2 " in "\n".join(thresholds.lines(both))


def test_of_no_runs_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs yet"):
        thresholds.main(["--runs", str(tmp_path)])
