"""python -m benchmarks.taylor_rank: ranks, the exact change of the loss, and how criteria are compared with it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import nn
from torch.nn import functional as F

from benchmarks import taylor_rank
from benchmarks.networks import CifarNet
from benchmarks.taylor_rank import ALL, ORACLES, correlations, loss_changes, ranks, spearman
from examples.digits import Images
from kfac_flat import NeuronPruner


def test_a_correlation_by_hand() -> None:
    heights, weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([5.0, 6.0, 7.0, 8.0, 7.0])
    assert ranks(weights).tolist() == [1, 2, 3.5, 5, 3.5]
    # Deviations of the ranks from 3: -2 -1 0 1 2 and -2 -1 .5 2 .5; products 4 1 0 2 1, squares 10 and 9.5.
    assert spearman(heights, weights) == pytest.approx(8 / math.sqrt(10 * 9.5))
    assert spearman(heights, -heights) == pytest.approx(-1)


NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.floats(-1e3, 1e3)), min_size=3, max_size=30)


@given(NUMBERS.filter(lambda pairs: all(len(set(column)) > 1 for column in zip(*pairs, strict=True))))
def test_it_is_what_others_compute(pairs: list[tuple[int, float]]) -> None:
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-9)
    assert spearman(a.exp(), b) == pytest.approx(spearman(a, b))


def data(*shape: int) -> Images:
    return Images(torch.randn(100, *shape), torch.randint(3, (100,)))


def test_the_change_of_the_loss_is_that_of_a_network_without_the_neuron() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    model.append(nn.Linear(5, 3))
    model(torch.randn(64, 1, 4, 4) + 1)
    images, before = data(1, 4, 4), copy.deepcopy(model.state_dict())
    reads = {"4": torch.arange(4).repeat_interleave(4), "6": torch.arange(4, 9)}
    found = loss_changes(model, reads, torch.arange(9), images)

    exact = copy.deepcopy(model).double().eval()
    x = images.images.double()
    maps = exact[:3](x)
    for gone in range(9):
        z = maps.clone()
        if gone < 4:
            z[:, gone] = 0
        hidden = exact[3:6](z)
        if gone >= 4:
            hidden[:, gone - 4] = 0
        change = F.cross_entropy(exact[6](hidden), images.labels) - F.cross_entropy(exact(x), images.labels)
        assert found[gone].item() == pytest.approx(change.item(), abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_criteria_of_first_order_are_right_where_the_loss_is_linear_in_the_neurons() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 3))
    with torch.no_grad():
        model[2].weight *= 1e-4
    images = data(4)
    found = correlations(model, Images(images.images[:64], images.labels[:64]))["absolute change"]  # in one batch
    for first_order in ("theta", "taylor 2019"):
        assert found[first_order][ALL] == pytest.approx(1, abs=1e-3)
        assert found[first_order]["0"] == found[first_order][ALL]
    assert abs(found["random"][ALL]) < 0.5


def test_layers_are_compared_by_themselves_and_all_together() -> None:
    torch.manual_seed(0)
    model = CifarNet((4, 4, 6))
    images = data(3, 8, 8)
    found = correlations(model, images)
    pruner = NeuronPruner(model, torch.optim.SGD(model.parameters()), images.images[:1], target=0.5)
    assert found.keys() == ORACLES.keys()
    for criteria in found.values():
        assert criteria.keys() == taylor_rank.CRITERIA.keys()
        for by_layer in criteria.values():
            assert {
                name for layers in by_layer if layers != ALL for name in layers.split(", ")
            } == pruner.widths.keys() - {"head"}
        plain, normed = criteria["taylor"], criteria["taylor, l2 per layer"]
        assert all(plain[layer] == normed[layer] for layer in plain if layer != ALL)
        assert plain[ALL] != normed[ALL]


def test_runs_are_written_down_and_not_repeated(tmp_path: Path, capsys: Any) -> None:
    def command(*arguments: str) -> list[dict[str, Any]]:
        given = ["--task", "digits", "--epochs", "1", "--seen", "0.1", "--images", "16", "--out", str(tmp_path)]
        taylor_rank.main([*given, *arguments])
        return [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]

    (first,) = command("--seeds", "0")
    again, second = command("--seeds", "0", "1")
    assert again == first
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["versions"]["torch"] == torch.__version__
    assert "--seen 0.1" in first["command"]
    values = [run["correlations"]["change"]["theta"][ALL] for run in (first, second)]
    assert all(-1 <= value <= 1 for value in values)
    printed, written = capsys.readouterr().out, (tmp_path / "digits.txt").read_text()
    for part in (f"{sum(values) / 2:.2f} ±", first["hardware"]):
        assert part in printed
        assert part in written
