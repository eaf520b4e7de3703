"""python -m benchmarks.eigendamage: all methods start alike, end at the same size, and are written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import eigendamage

pytestmark = pytest.mark.usefixtures("cifar")


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the form of CIFAR-10, in its place."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    fake = SimpleNamespace(CIFAR10=lambda root, train: SimpleNamespace(data=pixels, targets=[3, 7, 1] * 100))
    monkeypatch.setattr("benchmarks.images.datasets", fake)


def command(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Prune small networks; returns all runs that are there afterwards."""
    sizes = ["--width=8", "--epochs=1", "--tuning=2", "--fisher=64", "--seen=0.5", "--seeds", "0"]
    given = ["--networks", "vgg", "--levels", "0.5", "--passes", "1", *sizes, "--data-root", str(folder / "data")]
    eigendamage.main([*given, "--out", str(folder), *map(str, arguments)])
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("network", eigendamage.NETWORKS)
def test_every_method_removes_as_many_parameters_from_the_same_network(network: str, tmp_path: Path) -> None:
    runs = command(tmp_path, "--networks", network)
    assert [r["method"] for r in runs] == list(eigendamage.METHODS)
    assert len({r["dense_accuracy"] for r in runs}) == len({r["dense_parameters"] for r in runs}) == 1
    for r in runs:
        assert r["reached"]
        assert r["parameters"] <= r["dense_parameters"] / 2
        assert r["parameters"] > 0.4 * r["dense_parameters"]
        assert r["macs"] < r["dense_macs"]
        assert 0 <= r["accuracy"] <= 100
        assert r["versions"]["torch"] == torch.__version__
        assert r["hardware"]
        assert str(tmp_path / "data") not in r["command"]


def test_runs_are_not_repeated_and_the_table_says_what_is_known(tmp_path: Path, capsys: Any) -> None:
    (first,) = command(tmp_path, "--methods", "Kron-OBD")
    again, twice = command(tmp_path, "--methods", "Kron-OBD", "--passes", 1, 2)
    assert again == first
    assert (first["passes"], twice["passes"]) == (1, 2)
    assert twice["parameters"] == pytest.approx(first["parameters"], rel=0.05)
    printed, written = capsys.readouterr().out, (tmp_path / "table.txt").read_text()
    for part in (
        "vgg, 50% of the parameters removed",
        f"{twice['accuracy']:.2f}",
        first["hardware"],
        "--data-root DATA",
    ):
        assert part in printed
        assert part in written


def test_a_level_that_the_caps_keep_from_being_reached_is_marked(tmp_path: Path, capsys: Any) -> None:
    (run,) = command(tmp_path, "--methods", "C-OBD", "--levels", "0.95", "--passes", 2)
    assert not run["reached"]
    assert "x fewer *" in capsys.readouterr().out


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs yet"):
        eigendamage.main(["--report", "--out", str(tmp_path)])


@pytest.mark.parametrize("wrong", [["--levels", "1"], ["--methods", "guessing"], ["--passes", "0"]])
def test_impossible_options_are_refused(wrong: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        eigendamage.main(wrong)
    assert exit_.value.code == 2
    assert wrong[0] in capsys.readouterr().err
