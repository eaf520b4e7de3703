"""The README's code runs as it stands, and its commands are the ones that work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_blocks_run_and_the_last_rebuilds_what_the_first_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    train, _, load = code_blocks()
    loader = [(torch.randn(12, 6), torch.arange(12) % 3) for _ in range(3)]
    trained: dict[str, Any] = {
        "build_model": build_model,
        "example_inputs": torch.randn(1, 6),
        "loader": loader,
        "epochs": 14,
    }
    exec(train, trained)
    loaded: dict[str, Any] = {"build_model": build_model}
    exec(load, loaded)
    assert trained["pruner"].sparsity >= 0.75
    x = torch.randn(5, 6)
    assert torch.equal(loaded["model"](x), trained["model"].eval()(x))


def test_the_options_shown_are_taken_and_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {
        "model": model,
        "optimizer": optimizer,
        "example_inputs": torch.randn(1, 6),
        "ema": AveragedModel(model),
        "accuracy": [98.0],
    }
    exec("from kfac_flat import NeuronPruner\n" + code_blocks()[1], given)
    assert {path.name for path in tmp_path.iterdir()} == {"widths.png", "run.html"}


def test_the_two_commands_stand_there_to_the_letter() -> None:
    assert 'python -m pip install -e ".[examples]" -c constraints.txt && python -m examples.digits' in README
    assert 'python -m pip install -e ".[test]" -c constraints.txt && python -m pytest' in README
