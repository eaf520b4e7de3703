"""python -m benchmarks.pruner_speed: what it measures, and what it says where nothing could be measured."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import one_cut, pruner_speed, saliency_cost
from benchmarks.one_cut import EvenPruner, LargestFirst
from examples.torchvision_models import models
from kfac_flat import NeuronPruner

MODEL = "squeezenet1_1"


def command(folder: Path, *arguments: Any) -> dict[str, Any]:
    """Run it once without torch-pruning on one small model; returns what it wrote."""
    once = ["--models", MODEL, "--no-peer", "--tries", "1", "--image-size", "64", "--out", str(folder)]
    pruner_speed.main([*once, *arguments])
    (written,) = folder.glob("*.json")
    return json.loads(written.read_text())


def test_a_cut_is_measured_and_written_down_with_its_circumstances(tmp_path: Path, capsys: Any) -> None:
    written = command(tmp_path / "not" / "there")
    found = written["models"][MODEL]["kfac-flat"]
    assert "error" not in found
    assert found["trains"] is True
    assert 0 < found["build"] < 100
    assert 0 < found["cut"] < 100
    assert 0 < found["build_cpu"] < 100
    assert 0 < found["cut_cpu"] < 100
    assert found["neurons"] == pytest.approx(0.5, abs=0.01)
    assert found["reach"] > 0.99
    assert found["largest"] > found["parameters"]
    assert 2.5 < found["parameters"] < 4.5  # the cut is even, and most parameters stand between two cut layers
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["threads"] == 1
    assert written["hardware"]["cpu"]
    assert written["command"].startswith(f"python -m benchmarks.pruner_speed --models {MODEL}")
    printed, text = capsys.readouterr().out, (tmp_path / "not" / "there" / "cuts.txt").read_text()
    for part in (MODEL, f"{found['parameters']:.2f}x", f"{found['macs']:.2f}x", "50.0%", "yes"):
        assert part in printed
        assert part in text
    assert f"torch {torch.__version__}" in text


def test_the_fastest_cut_tells_and_what_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, failed = {"build_cpu": 2.0, "cut_cpu": 1.0}, {"build_cpu": 1.0, "cut_cpu": 1.5}, {"error": "TypeError"}
    for made, tries, told in [([slow, fast, slow], 3, fast), ([slow, fast], 1, slow), ([failed, fast], 3, failed)]:
        left = iter(made)
        monkeypatch.setattr(pruner_speed, "measure_cut", lambda *_, left=left: next(left))
        assert pruner_speed.fastest_cut("ours", MODEL, Namespace(tries=tries)) == told


def test_what_takes_too_long_is_given_up_and_reported(tmp_path: Path) -> None:
    found = command(tmp_path, "--timeout", "0.01")["models"][MODEL]["kfac-flat"]
    assert found["error"] == "> 0.01 s"
    assert "> 0.01 s" in (tmp_path / "cuts.txt").read_text()


def test_what_fails_is_reported_in_a_word_and_in_full(tmp_path: Path) -> None:
    found = command(tmp_path, "--image-size", "4")["models"][MODEL]["kfac-flat"]
    assert found["error"] == "RuntimeError"
    assert f"{MODEL}, kfac-flat: RuntimeError: " in (tmp_path / "cuts.txt").read_text()


def test_a_result_says_what_was_known_before_it_failed() -> None:
    assert pruner_speed.cells({"build_cpu": 1.234, "error": "> 9 s"}) == ["1.23", "> 9 s", *[""] * 7]


def measured(monkeypatch: pytest.MonkeyPatch, cut: Any) -> dict[str, Any]:
    monkeypatch.setitem(one_cut.LIBRARIES, "made up", cut)
    known: dict[str, Any] = {}
    one_cut.measure("made up", MODEL, 64, lambda **told: known.update(told))
    return known


def test_no_cut_reaches_nothing_and_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    known = measured(monkeypatch, lambda model, x, tell: None)
    assert known.pop("half") == one_cut.halved(one_cut.build(MODEL))
    assert known == {"neurons": 0, "reach": 0, "parameters": 1, "macs": 1, "trains": True}


def test_a_cut_by_hand_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(model: nn.Module, x: torch.Tensor, tell: Any) -> None:
        last = model.features[12]  # its 3x3 expansion: 64 -> 256; with 128 of them gone, the classifier reads 384
        last.expand3x3 = nn.Conv2d(64, 128, 3, padding=1)
        model.classifier[1] = nn.Conv2d(384, 1000, 1)

    dense = models.squeezenet1_1()
    total = sum(p.numel() for p in dense.parameters())
    outputs = sum(m.out_channels for m in dense.modules() if isinstance(m, nn.Conv2d)) - 1000
    known = measured(monkeypatch, cut)
    assert known["neurons"] == pytest.approx(128 / outputs)
    assert known["parameters"] == pytest.approx(total / (total - 128 * (64 * 9 + 1) - 128 * 1000))
    assert known["reach"] == pytest.approx((256 * (64 * 9 + 1) + 512 * 1000) / total)


def test_halving_all_layers_is_arithmetic() -> None:
    """Against the same classes built with half of the channels."""

    def network(width: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, groups=width)),
            *(nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 3, groups=2), nn.Flatten()),
            nn.Linear(2 * width, one_cut.CLASSES),
        )

    whole, half = (sum(p.numel() for p in network(width).parameters()) for width in (16, 8))
    assert one_cut.halved(network(16)) == pytest.approx(whole / half)


def test_the_even_pruner_takes_about_half_of_every_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 200), nn.ReLU(), nn.Linear(200, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = EvenPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, events=1).step()
    assert all(0.4 < report.widths_after[name] / report.widths_before[name] < 0.6 for name in ("0", "2"))


def test_the_largest_neurons_go_first() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"target": 0.2, "per": "parameter", "max_share": 0.5, "start": 1, "events": 1}
    pruner = LargestFirst(model, optimizer, torch.randn(1, 4), **options)
    assert pruner.plan().widths_after == {"0": 38, "2": 10, "4": 100}  # 4 + 1 + 20 parameters each, and 40 + 1 + 100


def test_reading_is_timed_beside_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    small = {"tiny": lambda: (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10)), (6,))}
    monkeypatch.setattr(saliency_cost, "NETWORKS", small)
    recorded = []
    record = NeuronPruner._record
    monkeypatch.setattr(NeuronPruner, "_record", lambda pruner, optimizer: recorded.append(record(pruner, optimizer)))
    pruner_speed.main(["--saliency", "--repetitions", "3", "--batch-size", "4", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "saliency.json").read_text())
    seconds = written["seconds"]["tiny"]
    assert len(recorded) == 3 * (3 + 1), "each repetition and the one before: a watched step, a reading, and none"
    assert 0 < seconds["passing"] < seconds["reading"] < seconds["watched"]
    assert seconds["share"] == pytest.approx(17 / 12_500, rel=0.1), "of the steps of 4 that 50,000 images make"
    share, step = seconds["share"], seconds["step"]
    cost = (share * seconds["reading"] + (1 - share) * seconds["passing"]) / step
    assert f"{cost:.2%}" in capsys.readouterr().out


def test_help_names_the_options(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        pruner_speed.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--models", "--no-peer", "--timeout", "--saliency", "--threads", "--out"):
        assert option in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--models", "resnet19"], "no classifier resnet19"),
        (["--timeout", "0"], "--timeout must be more than 0"),
        (["--threads", "-1"], "--threads: -1 must be at least 1"),
    ],
)
def test_impossible_options_are_refused(wrong: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        pruner_speed.main([*wrong, "--no-peer"])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
