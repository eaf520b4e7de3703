"""python -m benchmarks.readings: what it compares, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import readings
from benchmarks.readings import agreement, chosen, of_epoch


def test_scores_agree_with_themselves_and_not_with_their_opposite() -> None:
    scores = torch.tensor([3.0, 1.0, 4.0, 2.0])
    assert agreement(scores, scores) == {"spearman": pytest.approx(1), "lower half": 1}
    assert agreement(scores, -scores) == {"spearman": pytest.approx(-1), "lower half": 0}
    assert agreement(scores, torch.tensor([3.0, 1.0, 2.0, 4.0]))["lower half"] == 0.5


def test_the_steps_are_those_that_a_pruner_reads() -> None:
    assert chosen(2, 7).tolist() == [0, 3, 6]
    assert chosen(8, 7).tolist() == list(range(7))


def test_an_epoch_is_compared_as_it_says() -> None:
    torch.manual_seed(0)
    thetas, before = torch.rand(9, 40), torch.rand(40)
    found = of_epoch(thetas, before)
    assert found["4"] == agreement(thetas[[0, 2, 4, 6, 8]].mean(0), thetas.mean(0))
    assert found["64"]["lower half"] == 1
    assert found["1"]["lower half"] < 1
    assert found["odd against even"] == agreement(thetas[[0, 2, 4, 6, 8]].mean(0), thetas[[1, 3, 5, 7]].mean(0))
    assert found["epoch before"] == agreement(before, thetas.mean(0))
    assert "epoch before" not in of_epoch(thetas, None)


@pytest.mark.parametrize("method", ["theta", "hgnp"])
def test_each_seed_is_written_down_once(tmp_path: Path, capsys: Any, method: str) -> None:
    command = ["--epochs", "2", "--method", method, "--out", str(tmp_path)]
    readings.main([*command, "--seeds", "0"])
    readings.main([*command, "--seeds", "0", "1"])
    lines = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[0]["steps"] == 21
    assert lines[0]["agreement"][1]["8"] != lines[1]["agreement"][1]["8"]
    assert 0.5 < lines[0]["agreement"][1]["8"]["spearman"] < 1 == lines[0]["agreement"][1]["32"]["lower half"]
    assert "odd against even" in capsys.readouterr().out
    assert "of 21 steps" in (tmp_path / "digits.txt").read_text()
