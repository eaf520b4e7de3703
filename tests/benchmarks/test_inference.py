"""python -m benchmarks.inference: three networks, timed in turn at each batch size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import inference
from benchmarks.methods import METHODS
from benchmarks.records import read_records
from benchmarks.tasks import TASKS
from benchmarks.training import Trained, Training
from examples.digits import DigitsNet, Images


def test_networks_take_turns_at_each_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, int]] = []

    def latency(model: Any, inputs: Any) -> float:
        calls.append((model, len(inputs.args[0])))
        return float(len(calls))

    monkeypatch.setattr(inference, "latency", latency)
    networks = {name: nn.Linear(2, 2) for name in ("full", "neurons")}
    found = inference.timed(networks, torch.zeros(9, 2), (1, 4), 2)
    full, neurons = networks.values()
    assert calls == [(full, 1), (neurons, 1), (full, 1), (neurons, 1), (full, 4), (neurons, 4), (full, 4), (neurons, 4)]
    assert found == {"full": {"1": [1.0, 3.0], "4": [5.0, 7.0]}, "neurons": {"1": [2.0, 4.0], "4": [6.0, 8.0]}}


def test_a_comparison_is_of_networks_that_lost_nothing_neurons_or_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], network=partial(DigitsNet, 8)))
    usual = [
        "--task",
        "digits",
        "--epochs",
        "2",
        "--batch-size",
        "1",
        "8",
        "--repetitions",
        "2",
        "--out",
        str(tmp_path),
    ]
    inference.main(usual)
    (run,) = read_records(tmp_path / "digits.jsonl")
    full, neurons, weights = (run["networks"][name] for name in ("full", "neurons", "weights"))
    assert full["macs"] == weights["macs"] > 5 * neurons["macs"]
    assert full["parameters"] == weights["parameters"] > 5 * neurons["parameters"]
    assert weights["nonzero"] < full["nonzero"] / 5
    for network in (full, neurons, weights):
        assert network["latencies"].keys() == {"1", "8"}
        assert all(len(times) == 2 and min(times) > 0 for times in network["latencies"].values())
    assert (run["accuracy"], run["batch_sizes"]) == (neurons["accuracy"], "1 8")
    inference.main(usual)
    assert read_records(tmp_path / "digits.jsonl") == [run]


def test_each_network_is_trained_by_its_method_and_measured_on_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[float, int, int]] = {}

    def train(training: Training, *_: Any) -> Trained:
        name = next(name for name, known in METHODS.items() if known is training.method)
        asked[name] = training.sparsity, training.seed, training.epochs
        return Trained(nn.Linear(4, 2, bias=False), seconds=10.0 ** len(asked), missed=0.0)

    monkeypatch.setattr(inference, "train", train)
    monkeypatch.setattr(inference, "accuracy", lambda model, data: float(len(data.labels)))
    data = tuple(Images(torch.ones(n, 4), torch.zeros(n, dtype=torch.long)) for n in (30, 7))
    record = inference.compare(TASKS["digits"], 0.75, 3, 5, data, (1,), 1)  # type: ignore[arg-type]
    assert asked == {"sgd": (0.0, 3, 5), "hgnp": (0.75, 3, 5), "weight-magnitude": (0.75, 3, 5)}
    assert record["seconds"] == 1110.0
    assert {network["accuracy"] for network in record["networks"].values()} == {7.0}
    assert {network["macs"] for network in record["networks"].values()} == {8}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sparsity", "0"], "--sparsity 0 is the full network"),
        (["--batch-size", "100000"], "digits has 450 test images"),
    ],
)
def test_what_cannot_be_timed_is_refused(wrong: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        inference.main([*wrong, "--out", str(tmp_path)])
    assert message in f"{exit_.value} {capsys.readouterr().err}"
