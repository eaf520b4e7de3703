"""python -m benchmarks.policy: what it compares, what it writes down, and how it counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import policy
from benchmarks.policy import TASKS, Policy
from benchmarks.records import identity
from examples.digits import Images
from kfac_flat import FlatKFAC, NeuronPruner

DENSE = 288  # neurons of the network for digits


def command(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Train on digits for two epochs; returns all runs that are there afterwards."""
    usual = ["--tasks", "digits", "--epochs", "2", "--seeds", "0", "--levels", "0.75", "--out", str(folder)]
    policy.main([*usual, *map(str, arguments)])
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_runs_are_written_down_with_their_circumstances_and_not_repeated(tmp_path: Path, capsys: Any) -> None:
    (first,) = command(tmp_path, "--policies", "plain")
    assert first["neurons"] == pytest.approx(DENSE / 4, abs=2)
    assert first["parameters"] < 77_290 / 4
    assert first["macs"] < 2_116_224 / 4
    assert 5 < first["accuracy"] <= 100
    assert identity(first, policy.IDENTITY) == ("digits", "plain", 0.75, 0, 2)
    assert first["versions"]["torch"] == torch.__version__
    assert first["threads"] == 1
    assert first["hardware"]
    assert first["revision"]
    assert first["seconds"] > 0
    assert "--epochs 2" in first["command"]

    again, layer = command(tmp_path, "--policies", "plain", "ranking=layer")
    assert again == first
    assert layer["policy"] == "ranking=layer"
    assert layer["neurons"] == pytest.approx(DENSE / 4, abs=3)
    printed, written = capsys.readouterr().out, (tmp_path / "table.txt").read_text()
    for part in ("75% of the neurons removed, 2 epochs", f"{layer['accuracy']:.2f}", first["hardware"]):
        assert part in printed
        assert part in written


def test_the_dense_network_keeps_all_its_neurons(tmp_path: Path) -> None:
    (dense,) = command(tmp_path, "--levels", "0", "--policies", "plain", "pace=cubic")
    assert (dense["neurons"], dense["parameters"], dense["macs"]) == (DENSE, 77_290, 2_116_224)


def test_differences_are_taken_seed_by_seed_against_the_same_optimizer(tmp_path: Path, capsys: Any) -> None:
    accuracies = {
        "plain": (90.0, 80.0, 70.0),
        "pace=cubic": (91.0, 83.0),  # +1 and +3: mean 2, deviation 1.41 of each, 1 of their mean
        "FlatKFAC": (50.0, 60.0),
        "FlatKFAC+pace=cubic": (52.0, 61.0),  # +2 and +1: mean 1.5, deviation 0.71 of each, 0.5 of their mean
    }
    common = {"task": "digits", "level": 0.9, "epochs": 24, "neurons": 1, "parameters": 2, "macs": 3, "seconds": 4}
    made = {"command": "c", "revision": "r", "versions": {"torch": "2"}, "hardware": "h", "threads": 1}
    lines = [
        json.dumps({**common, **made, "policy": name, "seed": seed, "accuracy": value})
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + "\n")
    policy.main(["--report", "--out", str(tmp_path)])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    assert rows["plain"] == ["80.00", "±", "10.00", "3", "1", "2", "3"]
    assert rows["pace=cubic"] == ["87.00", "±", "5.66", "+2.00", "±", "1.41", "+2.0", "2", "1", "2", "3"]
    assert rows["FlatKFAC+pace=cubic"] == ["56.50", "±", "6.36", "+1.50", "±", "0.71", "+3.0", "2", "1", "2", "3"]


@pytest.mark.parametrize("name", ["plain", "events=10", "pace=cubic+events=2"])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_all_policies_remove_last_at_the_end_of_the_same_epoch(task: policy.Task, name: str) -> None:
    schedule = Policy.read(name).schedule(task, task.epochs)
    assert schedule["start"] >= 1
    assert schedule["start"] + (schedule["events"] - 1) * schedule["every"] == task.last
    assert schedule["events"] == Policy.read(name).options.get("events", 5)


def test_a_policy_says_what_differs_and_what_it_is_compared_with() -> None:
    read = Policy.read("FlatKFAC+max_share=0.95+normalize=l2+events=10")
    assert read.options == {"pace": "linear", "max_share": 0.95, "normalize": "l2", "events": 10}
    assert read.flat
    assert read.reference == "FlatKFAC"
    assert Policy.read("plain") == Policy("plain", False, {"pace": "linear", "max_share": 1.0})
    assert Policy.read("per=mac").reference == "plain"
    assert all(len(Policy.read(name).options) <= len(name.split("+")) + 2 for name in policy.POLICIES)


class Watched(Images):
    """Images that remember the labels of the batches that were asked for."""

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in super().batches(size, generator):
            vars(self).setdefault("seen", []).append(labels)
            yield images, labels


def train(monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> tuple[Any, dict[str, Any], list[Tensor]]:
    """Train briefly on digits; returns optimizer and options that the pruner was given, and the labels seen."""
    given: dict[str, Any] = {}

    def pruner(model: Any, optimizer: Any, example: Any, **options: Any) -> NeuronPruner:
        given.update(options, optimizer=optimizer)
        return NeuronPruner(model, optimizer, example, **options)

    train_set, test_set = TASKS["digits"].load(None)
    watched = Watched(train_set.images[:400], train_set.labels[:400])
    with monkeypatch.context() as patch:
        patch.setattr(policy, "NeuronPruner", pruner)
        policy.run(TASKS["digits"], Policy.read(name), 0.75, seed, 2, watched, test_set)
    return given.pop("optimizer"), given, vars(watched)["seen"]


def test_a_policy_reaches_pruner_and_optimizer_and_leaves_the_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, options, seen = train(monkeypatch, "plain", seed=0)
    flat, others, again = train(monkeypatch, "FlatKFAC+normalize=max+ranking=layer", seed=0)
    _, _, different = train(monkeypatch, "plain", seed=1)
    assert others == options | {"normalize": "max", "ranking": "layer"}
    assert isinstance(flat, FlatKFAC)
    assert isinstance(plain, torch.optim.SGD)
    assert len(seen) == 2 * (400 // 2 // 64), "half of the images in each epoch"
    assert torch.equal(torch.cat(seen), torch.cat(again))
    assert not torch.equal(torch.cat(seen), torch.cat(different))


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Noise in the form of CIFAR-10, in its place."""
    pixels = np.random.default_rng(0).integers(0, 256, (2_500, 32, 32, 3), dtype=np.uint8)
    fake = SimpleNamespace(CIFAR10=lambda root, train: SimpleNamespace(data=pixels, targets=[3, 7] * 1_250))
    monkeypatch.setattr("benchmarks.images.datasets", fake)
    return pixels


def test_cifar_is_made_smaller_by_averaging(cifar: np.ndarray, tmp_path: Path) -> None:
    train_set, test_set = TASKS["cifar"].load(tmp_path)
    assert train_set.images.shape == (2_500, 3, 16, 16)
    assert test_set.images.shape == (2_000, 3, 16, 16)
    assert train_set.labels[:3].tolist() == [3, 7, 3]
    expected = cifar[5, 6:8, 2:4, 1].mean() / 255  # channel 1 of the pixel in row 3 and column 1
    assert train_set.images[5, 1, 3, 1].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("cifar")
def test_the_network_for_cifar_loses_as_many_neurons_as_asked(tmp_path: Path) -> None:
    folders = ["--data-root", str(tmp_path), "--out", str(tmp_path)]
    policy.main(["--tasks", "cifar", *folders, "--epochs=2", "--seeds=0", "--levels", "0", "0.5", "--policies=plain"])
    dense, pruned = (json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())
    assert dense["neurons"] == 16 + 2 * 2 * 16 + 3 * 32 + 3 * 64
    assert pruned["neurons"] == pytest.approx(dense["neurons"] / 2, abs=3)


def test_cifar_without_its_folder_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data-root"):
        policy.main(["--tasks", "cifar", "--out", str(tmp_path)])


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no runs yet"):
        policy.main(["--report", "--out", str(tmp_path)])


def test_help_names_the_options(capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        policy.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--tasks", "--levels", "--seeds", "--policies", "--epochs", "--data-root", "--report"):
        assert option in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--policies", "speed=11"], "neither FlatKFAC nor one of pace"),
        (["--policies", "pace=quartic"], "pace='quartic' must be one of 'linear', 'cubic'"),
        (["--policies", "events=many"], "invalid literal for int"),
        (["--levels", "1"], "must be at least 0 and less than 1"),
    ],
)
def test_impossible_options_are_refused(wrong: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        policy.main(wrong)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
