"""python -m benchmarks.readme: the README's tables are those of the runs, whatever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme

ROOT = Path(__file__).parents[2]


def run(method: str, accuracy: float, seed: int = 0, **own: Any) -> dict[str, Any]:
    return {
        "task": "digits",
        "method": method,
        "sparsity": 0.75,
        "seed": seed,
        "epochs": 24,
        "accuracy": accuracy,
        "hessian": 10 * accuracy,
        "accuracy_under_noise": {"0.4": accuracy / 2},
        **own,
    }


def test_the_tables_of_the_readme_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = readme.PAGE.read_text("utf-8")
    assert readme.written(page, readme.tables()) == page, "run python -m benchmarks.readme"


def test_a_row_for_each_task_and_level_with_the_best_mean_in_bold() -> None:
    runs = [
        run("hgnp", 90.0),
        run("hgnp", 92.0, 1),
        run("hgnp-thorough", 92.5),
        run("taylor", 93.0),
        run("sam+taylor", 95.0, missed=0.5),
        run("hgnp", 50.0, sparsity=0.98, budget="macs"),
        run("hgnp", 10.0, epochs=3),
        run("hgnp", 20.0, sparsity=0.85),
        run("taylor", 30.0, sparsity=0.5),
        run("hgnp", 99.0, task="mnist-lenet5", epochs=8),
    ]
    header, _, *rows = readme.race(runs)
    assert header.startswith(
        "| last-epoch test accuracy, % | HGNP | HGNP, thorough | HGNP, flat | no penalty | Taylor |"
    )
    assert rows == [
        "| digits, 75% | 91.0 ± 1.4 | 92.5 |  |  | **93.0** | 95.0 |  |  | 1 to 2 |",
        "| digits, 50x MACs | **50.0** |  |  |  |  |  |  |  | 1 |",
    ]


def test_flatness_has_a_column_for_each_measure_and_place() -> None:
    runs = [
        run(method, value + shift, seed, task=task, sparsity=level)
        for method, value in zip(readme.TRAINED_BY, (1.0, 3.0, 5.0, 7.0, 9.0), strict=True)
        for seed, shift in enumerate((-0.5, 0.5))
        for task, level in (("digits", 0.0), ("digits", 0.75), ("mnist-mlp", 0.0))
    ]
    header, _, sgd, *_ = readme.flat(runs)
    assert header.count("Hessian") == 3
    assert sgd == f"| SGD | {' | '.join([*['10.00 ± 7.07'] * 3, *['0 ± 0'] * 2])} |"


def test_a_page_without_marks_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    for text in ("nothing", "<!-- race -->", "<!-- /race --><!-- race -->"):
        page.write_text(text)
        with pytest.raises(SystemExit, match="the page lacks <!-- race --> with <!-- /race --> behind it"):
            readme.main(["--page", str(page)])
        assert page.read_text() == text
