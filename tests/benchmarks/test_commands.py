"""What the commands of the benchmarks have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.commands import Parser, begin


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--data-root", "/home/me/data"], "--data-root DATA"),
        (["--data-root=/home/me/data/"], "--data-root=DATA/"),
        (["--data", "my data", "--out", "my data/runs"], "--data DATA --out DATA/runs"),
        (["--data-root", "data", "--out", "data-free"], "--data-root DATA --out data-free"),
        (["--data-root", "data", "--seeds", "1"], "--data-root DATA --seeds 1"),
        (["--data-root", "."], "--data-root DATA"),
        (["--out", "other runs"], "--out 'other runs'"),
    ],
)
def test_the_command_is_written_down_but_where_the_data_lie(given: list[str], written: str) -> None:
    parser = Parser("data_free", "")
    for name in ("--data-root", "--out", "--seeds"):
        parser.add_shared(name)
    assert parser.read(given).command == f"python -m benchmarks.data_free {written}"


def test_a_command_without_options_is_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["step_cost.py"])
    assert Parser("step_cost", "").read(None).command == "python -m benchmarks.step_cost"


def test_a_command_begins_with_its_threads_and_its_folder(tmp_path: Path) -> None:
    parser, threads = Parser("accuracy", ""), torch.get_num_threads()
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("elsewhere"))
    out = tmp_path / "not" / "there"
    try:
        console = begin(parser.read(["--threads", "3", "--out", str(out)]), width=50)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert out.is_dir()
    assert console.width == 50
