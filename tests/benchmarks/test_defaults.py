"""The comparison of FlatKFAC's settings, on digits for an epoch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD

from baselines import SAM
from benchmarks import defaults
from kfac_flat import FlatKFAC


def runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]


def test_settings_differ_by_what_they_say_and_are_told_against_sgd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    short = replace(defaults.SMALL_TASKS["digits"], epochs=1, last=1, seen=0.2)
    monkeypatch.setitem(defaults.SMALL_TASKS, "digits", short)
    command = ["--tasks", "digits", "--sparsity", "0", "0.5", "--seeds", "0", "--out", str(tmp_path)]
    defaults.main([*command, "--settings", "sgd", "mu=0.3+every=1"])
    first = runs(tmp_path)
    assert [(r["setting"], r["sparsity"]) for r in first] == [
        ("sgd", 0), ("mu=0.3+every=1", 0), ("sgd", 0.5), ("mu=0.3+every=1", 0.5),
    ]  # fmt: skip
    assert first[0]["rho"] != first[1]["rho"]
    assert first[2]["neurons"] < 0.6 * first[0]["neurons"]
    defaults.main([*command, "--settings", "sgd", "mu=0.3+every=1", "sam"])
    assert runs(tmp_path)[:4] == first
    assert [r["setting"] for r in runs(tmp_path)[4:]] == ["sam", "sam"]
    capsys.readouterr()
    defaults.main(["--report", "--out", str(tmp_path)])
    told = (tmp_path / "tables.txt").read_text()
    difference = first[1]["accuracy"] - first[0]["accuracy"]
    assert f"{first[1]['accuracy']:.2f} ({difference:+.2f})" in told
    assert told.splitlines()[0].strip() in capsys.readouterr().out


def test_a_setting_makes_the_optimizer_that_it_names() -> None:
    def made(setting: str) -> Any:
        model = nn.Linear(3, 2)
        return defaults.optimizer_of(setting)(SGD(model.parameters(), lr=0.1), model)

    assert type(made("sgd")) is SGD
    assert type(made("sam")) is SAM
    assert [made(setting)._rho for setting in ("sam", "sam=0.2")] == [0.05, 0.2]
    flat = made("mu=0.02+penalty=linear+every=3+fisher=empirical")
    assert isinstance(flat, FlatKFAC)
    options = flat._options
    assert (options.mu, options.penalty, options.every, options.fisher) == (0.02, "linear", 3, "empirical")
    assert made("default")._options.mu == 0.003


@pytest.mark.parametrize("wrong", ["speed=11", "mu=fast", "mu", "sam=far"])
def test_settings_that_cannot_be_read_are_refused(wrong: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        defaults.main(["--settings", wrong])
    assert "--settings" in capsys.readouterr().err
