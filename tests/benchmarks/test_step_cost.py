"""The benchmark of a step's cost, on one small network."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import step_cost


def measured(folder: Path, *arguments: Any) -> dict[str, Any]:
    step_cost.main(["--batch-size", "8", "--repetitions", "1", "--out", str(folder), *map(str, arguments)])
    found: dict[str, Any] = json.loads((folder / "cpu.json").read_text())
    return found


def test_every_row_and_schedule_is_told_with_how_it_was_made(tmp_path: Path) -> None:
    found = measured(tmp_path, "--models", "mlp", "--no-memory")
    ratios = found["results"]["mlp"]["time"]
    assert ratios.keys() == {*step_cost.ROWS, *step_cost.SCHEDULES}
    assert ratios[step_cost.BARE] == 1
    assert all(1 < ratios[name] < ratios["survey, full batch"] for name in step_cost.EIGENPAIRS)
    assert all(ratio > 0 for ratio in ratios.values())
    assert found["command"].startswith("python -m benchmarks.step_cost --batch-size 8")
    assert "BackPACK's KFAC and eigh" in (tmp_path / "cpu.txt").read_text()


def test_rows_that_cannot_train_a_network_are_left_out(tmp_path: Path) -> None:
    found = measured(tmp_path, "--widths", "4", "--no-memory")["results"]["width 4"]["time"]
    assert "BackPACK's KFAC and eigh" not in found  # it knows of no BatchNorm
    assert "SAM" in found


def test_rows_that_take_many_steps_time_can_be_left_out(tmp_path: Path) -> None:
    found = measured(tmp_path, "--batch-sizes", "4", "--no-peers")["results"]["batch 4"]
    assert not found["time"].keys() & set(step_cost.PEERS)
    assert found["batch_size"] == 4


def test_the_page_tells_and_draws_what_was_measured(tmp_path: Path) -> None:
    found = measured(tmp_path, "--widths", "4", "8", "--no-peers")
    page = tmp_path / "cost.md"
    step_cost.main(["--report", "--out", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "|  | width 4 | width 8 |" in text
    assert f"| SAM | {found['results']['width 4']['time']['SAM']:.2f} |" in text
    assert "batches of 8" in text
    assert "--device cuda" in text  # what has not been measured
    assert (tmp_path / "cost" / "cpu.png").stat().st_size > 10_000


def test_a_page_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no measurements yet"):
        step_cost.main(["--report", "--out", str(tmp_path)])


def test_a_schedule_takes_the_memory_of_its_largest_step() -> None:
    memory = {"between refreshes": 3.0, "refresh, quarter batch": 1.0, "survey, quarter batch": 2.0}
    assert step_cost.most(memory, every=2, survey_every=3, part="quarter") == 3
    assert step_cost.most(memory, every=1, survey_every=3, part="quarter") == 2


def test_a_schedule_costs_the_mean_of_its_steps() -> None:
    ratios = {"between refreshes": 1.0, "refresh, quarter batch": 2.0, "survey, quarter batch": 4.0}
    steps = [4.0, 1, 2.0, 1, 2.0, 1]  # a refresh every other step, each third one a survey
    assert step_cost.per_step(ratios, every=2, survey_every=3, part="quarter") == pytest.approx(sum(steps) / 6)


def test_peak_memory_counts_what_the_optimizer_adds() -> None:
    options = step_cost.parse(["--batch-size", "8", "--models", "mlp"])
    bare, exact = (step_cost.peak_memory("mlp", row, options) for row in (step_cost.BARE, step_cost.EXACT))
    parameters = 4 * (784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10) / 2**20
    assert 3 * parameters < bare < 4 * parameters  # weights, gradients, momentum
    assert exact > bare + 4 * 784**2 / 2**20  # a factor of its first layer


def test_peak_memory_between_refreshes_is_that_of_the_bare_optimizer() -> None:
    """The first step of each row, which is a refresh, does not count."""
    options = step_cost.parse(["--batch-size", "8", "--models", "mlp"])
    bare, between, survey = (
        step_cost.peak_memory("mlp", row, options) for row in (step_cost.BARE, step_cost.BETWEEN, "survey, full batch")
    )
    parameters = 4 * (784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10) / 2**20
    assert between - bare < 0.02 * parameters
    assert survey > between + 0.1 * parameters


def test_widths_and_batch_sizes_are_not_measured_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_cost.parse(["--widths", "4", "--batch-sizes", "4"])
    assert "not allowed with" in capsys.readouterr().err
