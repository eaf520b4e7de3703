"""python -m benchmarks.curvature: what it measures, what it writes down, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfac_flat
from benchmarks import curvature, curvature_page
from tests.reference import batch, mlp

CIRCUMSTANCES = {"command": "c", "revision": "r", "versions": {"torch": "2"}, "hardware": "h", "threads": 1}


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on few images, at the beginning and at the end."""
    monkeypatch.setattr(curvature, "MEASURED", 8)
    monkeypatch.setattr(curvature, "STOPS", 1)


@pytest.mark.usefixtures("briefly")
def test_runs_are_written_down_once_and_make_a_page(tmp_path: Path, capsys: Any) -> None:
    given = ["--tasks", "digits", "--epochs", "1", "--seeds", "0", "--out", str(tmp_path / "runs")]
    curvature.main([*given, "--settings", "sgd"])
    curvature.main([*given, "--settings", "sgd", "penalty=log"])
    sgd, flat = (json.loads(line) for line in (tmp_path / "runs" / "digits.jsonl").read_text().splitlines())
    assert (sgd["setting"], flat["setting"]) == ("sgd", "penalty=log")
    assert sgd["versions"]["torch"] == torch.__version__
    assert sgd["invariant"] == [name for name in sgd["measured"][0]["layers"] if name != "head"]
    assert sgd["measured"][0] == flat["measured"][0], "the same weights, images and labels"
    for run in (sgd, flat):
        assert [at["epoch"] for at in run["measured"]] == [0, 1]
        assert 5 < run["accuracy"] <= 100
        for at in run["measured"]:
            # the largest eigenvalue of a block is none above that of the whole, up to Lanczos' tolerance
            for kind in ("ggn", "hessian"):
                assert max(layer[kind] for layer in at["layers"].values()) <= at[kind] * 1.02
    assert sgd["measured"][1] != flat["measured"][1]

    page = tmp_path / "page.md"
    curvature.main([*given, "--report", "--page", str(page)])
    text = page.read_text()
    for part in ("## digits, 1 epochs", "| block2.shortcut.0 |", "### Growing weights", "| penalty=log |", "2 runs"):
        assert part in text
    assert (tmp_path / "page" / "digits-layers.png").stat().st_size > 10_000
    assert (tmp_path / "page" / "digits-settings.png").stat().st_size > 10_000


def test_expected_radii_are_what_many_draws_come_to() -> None:
    model, (x, _) = mlp(), batch(2, 4)
    seen = curvature.expected_radii(model, x)
    sampled = kfac_flat.spectral_radii(model, x.repeat(4000, 1), exact=True)
    assert seen == pytest.approx(sampled, rel=0.05)
    assert seen != pytest.approx(kfac_flat.spectral_radii(model, x, exact=True), rel=0.05)


def test_measuring_leaves_the_network_as_it_is() -> None:
    task = curvature.TASKS["digits"]
    data, _ = task.load(None)
    model = task.network().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    curvature.Measurement(task, type(data)(data.images[:8], data.labels[:8]))(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_only_weights_in_front_of_batchnorm_are_scale_invariant() -> None:
    task = curvature.TASKS["mnist-lenet5"]
    images = torch.rand(4, 1, 28, 28)
    measurement = curvature.Measurement(task, curvature.Images(images, torch.zeros(4).long()))
    assert measurement.invariant(task.network()) == []
    assert any(isinstance(m, nn.Conv2d) for m in task.network().modules())


def record(setting: str, seed: int, rho: float, squared_norm: float) -> dict[str, Any]:
    """A run of two layers; the second is the head, much longer and of no interest here."""
    layer = {"rho": rho, "expected_rho": rho, "ggn": 2 * rho, "hessian": 3 * rho, "squared_norm": squared_norm}
    head = {"rho": 9.0, "expected_rho": 8.0, "ggn": 1.0, "hessian": 1.0, "squared_norm": 1e6 * squared_norm}
    whole = {"ggn": 20.0, "hessian": 30.0, "sharpness": 0.1}
    stops = [{"epoch": e, "lr": 0.1, **whole, "layers": {"conv": layer, "head": head}} for e in (0, 1)]
    about = {"task": "digits", "setting": setting, "seed": seed, "epochs": 1, "accuracy": 90.0 + seed, "seconds": 1}
    return {**about, "invariant": ["conv"], "measured": stops, **CIRCUMSTANCES}


def test_what_the_length_takes_from_rho_is_told_apart_from_the_rest(tmp_path: Path) -> None:
    runs = [record("sgd", 0, 4.0, 10.0), record("sgd", 1, 2.0, 10.0)]
    runs += [record("flat", 0, 1.0, 20.0), record("flat", 1, 0.5, 28.8)]
    assert curvature_page.growth(runs, "flat") == [pytest.approx((2, 0.25)), pytest.approx((2.88, 0.25))]
    cells = list(curvature_page.growths(runs))[-1].split(" | ")
    assert cells[1:] == ["2.40 (2.00 to 2.88)", "0.42 (0.35 to 0.50)", "0.25 (0.25 to 0.25)", "0.60 (0.50 to 0.72) |"]
    (words,) = curvature_page.growth_in_words(runs)
    assert "log rho changes by -1.39: -0.88 by the length, -0.51 beside it" in words


def test_agreement_is_told_layer_by_layer_and_for_the_largest_rho() -> None:
    runs = [record("sgd", 0, 4.0, 1.0), record("sgd", 1, 2.0, 1.0)]
    rows = {line.split(" | ")[0].strip("| "): line for line in curvature_page.agreement(runs)}
    assert rows["conv"].startswith("| conv | 0.5 (0.5 to 0.5) | 0.5 (0.5 to 0.5) |")
    assert rows["head"].startswith("| head | 9 (9 to 9) | 8 (8 to 8) |")
    largest, total = (next(row for name, row in rows.items() if name.startswith(of)) for of in ("max of", "sum of"))
    assert " | 0.45 (0.45 to 0.45) | 0.4 (0.4 to 0.4) | " in largest
    assert " | 0.6 (0.55 to 0.65) | 0.55 (0.5 to 0.6) | " in total
    assert "in 50%" in curvature_page.agreement_in_words(runs)  # the head is off by more than 5


def test_correlation_is_of_ranks() -> None:
    assert curvature_page.correlation([1, 2, 3], [1, 10, 1000]) == pytest.approx(1)
    assert curvature_page.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert curvature_page.correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_unknown_settings_and_empty_folders_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as refused:
        curvature.main(["--settings", "speed=11"])
    assert refused.value.code == 2
    assert "speed=11 is none of mu" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="there are no runs"):
        curvature.main(["--report", "--out", str(tmp_path)])
