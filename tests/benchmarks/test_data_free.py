"""python -m benchmarks.data_free: what it prunes, and what it writes down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import data_free
from benchmarks.data_free import NETWORKS, measure, split, table, trained
from examples.digits import Images

COUNT = 512


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that tell their digit by where they are bright."""

    def data(root: Path, train: bool) -> Any:
        generator = torch.Generator().manual_seed(int(train))
        labels = torch.randint(10, (COUNT,), generator=generator)
        images = torch.randint(60, (COUNT, 28, 28), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label : 2 * label + 8] += 150
        return SimpleNamespace(data=images, targets=labels)

    monkeypatch.setattr(data_free, "datasets", SimpleNamespace(MNIST=data))


def test_all_is_written_down_with_its_circumstances_but_where_the_data_lie(
    mnist: None, tmp_path: Path, capsys: Any
) -> None:
    given = [
        "--networks",
        "lenet-300-100",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "2",
        "--weight-decays",
        "0.001",
        "--shares",
        "0.3",
        "0.5",
    ]
    data_free.main(["--data-root", "somewhere/private", *given, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "mnist.json").read_text())
    assert written["command"].startswith("python -m benchmarks.data_free --data-root DATA --networks lenet-300-100")
    assert "private" not in (tmp_path / "mnist.json").read_text() + (tmp_path / "mnist.txt").read_text()
    runs = written["networks"]["lenet-300-100"]
    assert len(runs) == 2 * 8
    pruned = ["data-free", "data-free, directions", "magnitude"]
    assert [run["method"] for run in runs[:8]] == ["dense", *pruned * 2, "cut-off"]
    for run in runs:
        assert 15 < run["accuracy"] <= 100
        if run["method"] in pruned:
            assert run["removed"] == pytest.approx(run["share"], abs=0.01)
    assert written["hardware"]["threads"] == 1
    assert "lenet-300-100" in capsys.readouterr().out
    assert "cut-off" in (tmp_path / "mnist.txt").read_text()


@pytest.mark.parametrize(("network", "parameters"), [("lenet-300-100", 266_610), ("lenet-5", 431_080)])
def test_networks_are_the_usual_ones_and_convolutions_stay(network: str, parameters: int) -> None:
    model = NETWORKS[network]()
    assert sum(p.numel() for p in model.parameters()) == parameters
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    test = Images(torch.rand(1000, 1, 28, 28), torch.zeros(1000).long())
    runs = measure(model, test, [0.5])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for run in runs[1:]:
        assert [run["widths"][name] for name in convolutions] == [20, 50][: len(convolutions)]


def test_changes_are_taken_seed_by_seed() -> None:
    def run(seed: int, method: str, share: float, accuracy: float) -> dict[str, Any]:
        return {
            "weight_decay": 0.001,
            "initial": 1.0,
            "seed": seed,
            "method": method,
            "share": share,
            "removed": share,
            "accuracy": accuracy,
        }

    runs = [run(0, "dense", 0, 90), run(0, "data-free", 0.5, 89), run(1, "dense", 0, 80), run(1, "data-free", 0.5, 78)]
    columns = [list(column.cells) for column in table({"net": runs}).columns]
    assert columns[3] == ["dense", "data-free"]
    assert columns[4][1] == "50.0 ± 0.0"
    assert columns[6] == ["+0.00 ± 0.00", "-1.50 ± 0.71"]


def test_held_out_images_are_the_last_of_the_training_images_and_not_trained_on() -> None:
    images = Images(torch.arange(10.0), torch.arange(10))
    first, last = split(images, 3)
    assert first.labels.tolist() == first.images.tolist() == list(range(7))
    assert last.labels.tolist() == last.images.tolist() == [7, 8, 9]


def test_linear_layers_start_from_a_multiple_of_the_usual_weights_and_convolutions_do_not() -> None:
    images = Images(torch.rand(128, 1, 28, 28), torch.zeros(128).long())
    usual, small = (trained("lenet-5", images, 1, 0.0, 0, initial) for initial in (1.0, 0.0))
    assert torch.allclose(usual[0].weight, small[0].weight, atol=0.05)
    assert usual[5].weight.norm() > 10
    assert small[5].weight.norm() < 0.1
