"""What is said of a model before training is what a pruner, and torch's own counter, find."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.one_cut import EvenPruner, macs, shapes
from examples.torchvision_models import models
from kfac_flat.pruning.inspection import Inspection, inspect
from kfac_flat.pruning.inspection_page import write_inspection
from tests.page.reading import read
from tests.pruning.masking import layers_of, pruner_for, widths_of
from tests.pruning.nets import CASES

NAMES = sorted(CASES)


def found(name: str, target: float | None = None) -> tuple[nn.Module, Any, Inspection]:
    model, inputs = CASES[name].build()
    return model, inputs, inspect(model, inputs, target)


@pytest.mark.parametrize("name", NAMES)
def test_layers_have_the_widths_and_parameters_of_the_modules(name: str) -> None:
    model, _, inspection = found(name)
    for layer, module in layers_of(model).items():
        said = inspection.layers[layer]
        assert (said.inputs, said.outputs) == widths_of(module)
        assert said.parameters == sum(p.numel() for p in module._parameters.values() if p is not None)
        assert said.kind == type(module).__name__
    assert inspection.size.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_frozen_and_the_sizes_are_those_of_a_pruner(name: str) -> None:
    model, inputs, inspection = found(name)
    pruner = pruner_for(model, inputs, target=1e-9)
    assert inspection.frozen == pruner.frozen
    assert inspection.size == pruner.size
    whole = {n for n, reason in pruner.frozen.items() if n in inspection.layers and inspection.layers[n].removable == 0}
    assert {n for n, layer in inspection.layers.items() if layer.removable == 0} >= whole


@pytest.mark.parametrize("name", NAMES)
def test_the_least_is_what_a_pruner_can_reach_and_no_less(name: str) -> None:
    model, inputs, inspection = found(name)
    share = 1 - inspection.least.neurons / inspection.size.neurons
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    more = share + 0.75 / inspection.size.neurons
    with pytest.raises(ValueError, match="cannot be reached"):
        EvenPruner(model, optimizer, inputs, target=more, start=1, events=1)
    pruner = EvenPruner(model, optimizer, inputs, target=share, start=1, events=1)
    before = shapes(model)
    report = pruner.step()
    assert report.after.neurons == inspection.least.neurons
    assert report.widths_after == {n: layer.outputs - layer.removable for n, layer in inspection.layers.items()}
    after = shapes(model)
    assert inspection.reached == sum(shape.numel() for n, shape in before.items() if after[n] != shape)
    assert inspection.least.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_s_channels_are_accounted_for_in_what_goes_together(name: str) -> None:
    model, inputs, inspection = found(name)
    groups = EvenPruner(model, torch.optim.SGD(model.parameters(), lr=0.0), inputs, target=1e-9)._groups
    in_groups = dict.fromkeys(inspection.layers, 0)
    for tied in inspection.tied:
        for layer, number in tied.members.items():
            in_groups[layer] += tied.groups * number
    assert sum(tied.groups for tied in inspection.tied) == len(groups.ids)
    for layer, said in inspection.layers.items():
        assert in_groups[layer] <= said.outputs
        assert said.removable <= in_groups[layer]
        if layer not in inspection.frozen:
            assert in_groups[layer] == said.outputs


def test_channels_of_one_layer_that_go_together_are_counted_on_table_and_page(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(2, 3, 3))
    inspection = inspect(model, torch.ones(1, 1, 6, 6))
    assert [(tied.groups, tied.members) for tied in inspection.tied] == [(2, {"0": 4})]
    assert "  2 x 4 of 0\n" in inspection.table()
    root = read(write_inspection(inspection, tmp_path / "model.html", "Shuffled"))
    assert root.table("Groups of channels.*") == {"4 of 0": ["2"]}


def test_macs_of_the_layers_add_up_to_those_that_run() -> None:
    for model, x in (
        (CASES["residual"].build()[0], torch.randn(1, 2, 8, 8)),
        (models.resnet18(), torch.randn(1, 3, 64, 64)),
        (models.mobilenet_v2(), torch.randn(1, 3, 64, 64)),
    ):
        model = model.to(x.dtype)
        inspection = inspect(model, x)
        assert sum(layer.macs for layer in inspection.layers.values()) == inspection.size.macs == macs(model, x)


def test_the_share_that_is_reached_is_the_one_the_benchmark_measures_by_cutting() -> None:
    model, x = models.resnet18(), torch.randn(1, 3, 64, 64)
    inspection = inspect(model, x)
    before = shapes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    EvenPruner(model, optimizer, x, target=0.5, start=1, every=1, events=1).step()
    after = shapes(model)
    assert inspection.reached == sum(shape.numel() for name, shape in before.items() if after[name] != shape)


@pytest.mark.parametrize("target", [0.25, 0.5])
@pytest.mark.parametrize("name", ["residual", "mlp", "unet"])
def test_an_even_cut_takes_about_the_same_share_of_each_layer(name: str, target: float) -> None:
    _, _, inspection = found(name, target)
    assert inspection.even is not None
    gone = inspection.size.neurons - inspection.even.size.neurons
    assert gone >= round(target * inspection.size.neurons)
    share = gone / inspection.size.neurons
    for layer, said in inspection.layers.items():
        if layer not in inspection.frozen:
            assert said.outputs - inspection.even.widths[layer] == pytest.approx(share * said.outputs, abs=1.5)


@pytest.mark.parametrize("target", [0.0, 1.0, -1, 2])
def test_targets_that_are_no_share_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        found("mlp", target)


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(ValueError, match=r"target=0.999 cannot be reached: \d+\.\d% of the neurons can go at most"):
        found("residual", 0.999)


def test_the_model_is_left_as_it_is() -> None:
    model, inputs = CASES["residual"].build()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    text = str(model)
    inspect(model, inputs, 0.5)
    assert str(model) == text
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("width", [60, 100, 140])
def test_lines_keep_to_the_width_where_names_allow(width: int) -> None:
    _, _, inspection = found("residual", 0.5)
    lines = inspection.table(width).splitlines()
    assert max(len(line) for line in lines) <= max(width, 80)


def test_a_model_that_has_nothing_to_lose_is_described_all_the_same() -> None:
    inspection = inspect(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3))
    assert inspection.reached == 0
    assert inspection.tied == []
    assert "none" in inspection.table()
    with pytest.raises(ValueError, match=r"0\.0% of the neurons can go at most"):
        inspect(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3), 0.5)
