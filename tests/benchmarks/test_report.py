"""python -m benchmarks.report: what stands in the tables follows from the runs and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

CIRCUMSTANCES = {"command": "c", "revision": "r", "versions": {"torch": "2"}, "hardware": "h", "threads": 1}
ACCURACIES = {  # by method and sparsity, one number per seed
    ("taylor", 0.5): [80.0, 90.0],
    ("taylor", 0.75): [60.0, 80.0],
    ("taylor", 0.9): [40.0],
    ("hgnp", 0.5): [90.0, 92.0],
    ("hgnp", 0.75): [69.0],
    ("hgnp", 0.9): [50.0, 52.0, 54.0],
    ("invented", 0.9): [99.0],
    ("sgd", 0.0): [95.0],
}


def records(task: str = "digits", epochs: int = 24) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "epochs": epochs,
            "accuracy": value,
            "seconds": 2.0,
            "neurons": 100 * (1 - sparsity),
            "parameters": 5000 + seed,
            "macs": 1e6 * (1 - sparsity) ** 2,
            "latency": 0.002,
            "rho": 1.5,
            "sharpness": 0.01,
            **CIRCUMSTANCES,
        }
        for (method, sparsity), values in ACCURACIES.items()
        for seed, value in enumerate(values)
    ]


def rows(lines: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_what_was_not_reached_is_marked() -> None:
    runs = records()
    for run in runs:
        run["missed"] = {"hgnp": 0.009, "invented": 0.5}.get(run["method"], 0.0)
    table = rows(list(report.accuracies(runs)))
    assert table["invented"][3] == "99.00 (1) †"
    assert table["hgnp"][3] == "**52.00 ± 2.00 (3)**"
    assert report.gain(runs, "hgnp") == report.gain(records(), "hgnp")
    for run in runs:
        run["missed"] = 0.5 * (run["method"] == "hgnp" and run["sparsity"] == 0.75)
    assert report.gain(runs, "hgnp") == pytest.approx(100 * ((91 + 52) / (85 + 40) - 1)), "where it went as far"


def test_accuracies_are_means_and_deviations_and_the_best_are_bold() -> None:
    table = rows(list(report.accuracies(records())))
    assert table["method"] == ["dense", "50% removed", "75% removed", "90% removed", "area vs taylor %"]
    assert table["taylor"][:4] == ["", "85.00 ± 7.07 (2)", "**70.00 ± 14.14 (2)**", "40.00 (1)"]
    assert table["hgnp"][:4] == ["", "**91.00 ± 1.41 (2)**", "69.00 (1)", "52.00 ± 2.00 (3)"]
    assert table["invented"] == ["", "", "", "**99.00 (1)**", ""]
    assert table["sgd"] == ["**95.00 (1)**", "", "", "", ""]
    assert list(table)[2:] == ["sgd", "hgnp", "taylor", "invented"], "in the order of the registry, then what it lacks"


def test_the_area_is_that_of_trapezoids_over_the_references() -> None:
    hgnp = 0.25 * (91 + 69) / 2 + 0.15 * (69 + 52) / 2
    taylor = 0.25 * (85 + 70) / 2 + 0.15 * (70 + 40) / 2
    assert report.gain(records(), "hgnp") == pytest.approx(100 * (hgnp / taylor - 1))
    assert report.gain(records(), "taylor") == 0
    assert report.gain(records(), "invented") is None
    without = [r for r in records() if (r["method"], r["sparsity"]) != ("hgnp", 0.75)]
    assert report.gain(without, "hgnp") == pytest.approx(100 * ((91 + 52) / (85 + 40) - 1)), "where both have runs"


def test_the_rest_stands_in_a_table_of_its_own() -> None:
    table = rows(list(report.sizes(records(), 0.9)))
    assert table["method"] == [*report.COLUMNS]
    assert table["hgnp"] == ["10", "5,001", "10,000", "2", "2", "1.5", "0.01"]
    assert table.keys() == {"method", "---", "hgnp", "taylor", "invented"}


def test_the_command_writes_all_tasks_with_pictures_and_circumstances(tmp_path: Path, capsys: Any) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    runs.mkdir()
    for task in ("digits", "mnist-mlp"):
        found = [*records(task), *records(task, epochs=2)]
        (runs / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    report.main(["--runs", str(runs), "--out", str(out)])
    text = (out / "accuracy.md").read_text()
    for task in ("digits", "mnist-mlp"):
        for epochs in (2, 24):
            assert f"## {task}, {epochs} epochs" in text
            assert f"(accuracy/{task}-{epochs}.png)" in text
            assert (out / "accuracy" / f"{task}-{epochs}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("- hardware: h") == 4
    assert text.count(f"- {len(records())} runs, {2 * len(records())} s of training") == 4
    assert f"{4 * len(records())} runs" in capsys.readouterr().out


def test_runs_to_other_budgets_or_computed_otherwise_are_reported_apart_and_dense_ones_with_every_budget() -> None:
    macs = [
        r | {"budget": "macs", "sparsity": 0.8} for r in records() if r["method"] == "hgnp" and r["sparsity"] == 0.9
    ]
    half = [r | {"amp": "bf16"} for r in records() if r["method"] == "sgd"]
    of_neurons, of_macs, in_half = report.settings([*records(), *macs, *half])
    assert of_neurons.runs == records()
    assert of_macs.runs == [*(r for r in records() if not r["sparsity"]), *macs]
    assert in_half.runs == half
    assert [s.title for s in (of_macs, in_half)] == ["digits, 24 epochs, MACs", "digits, 24 epochs, bf16"]
    assert [s.name for s in (of_neurons, of_macs)] == ["digits-24", "digits-24-MACs"]
    table = rows(list(report.accuracies(of_macs.runs, of_macs.budget)))
    assert table["method"][:2] == ["dense", "5x fewer MACs"]
    assert table["hgnp"][:2] == ["", "**52.00 ± 2.00 (3)**"]


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs yet"):
        report.main(["--runs", str(tmp_path), "--out", str(tmp_path)])
