"""What a cut leaves of FlatKFAC's own state: exactly what the manifest keeps."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat import CutError, FlatKFAC, NeuronPruner
from tests import reference
from tests.optimizer.loops import penalty, plain
from tests.pruning.nets import CASES
from tests.reference import batch, mlp


@pytest.mark.parametrize("name", ["mlp", "cnn_flatten", "residual", "grouped", "depthwise_multiplier"])
def test_a_cut_keeps_of_the_curvature_what_the_manifest_keeps(name: str) -> None:
    model, x = CASES[name].build()
    y = torch.arange(len(x)) % 3
    dense = copy.deepcopy(model)
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.01), model, mu=0.1, every=100, reduction="sum")
    pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=2, pace="linear")

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    before = copy.deepcopy(optimizer.state_dict()["kfac_flat"])
    for _ in range(2):
        assert pruner.step()
        after, layers = optimizer.state_dict()["kfac_flat"], pruner.state_dict()["layers"]
        for terms in ("mask_terms", "weight_terms"):
            for layer, term in before[terms].items():
                assert torch.equal(after[terms][layer], term[layers[layer]["in"]])
            assert after[terms].keys() == before[terms].keys()
            assert before[terms]
        for layer, v in before["eigenvectors"].items():
            area = dense.get_submodule(layer).weight[0, 0].numel()
            kept = {"A": v["A"].reshape(-1, area)[layers[layer]["in"]], "G": v["G"].reshape(-1)[layers[layer]["out"]]}
            for factor, vector in after["eigenvectors"][layer].items():
                expected = kept[factor].reshape(vector.shape)
                assert torch.allclose(vector, expected / expected.norm(dim=-1, keepdim=True))
        step()


def layers_read(model: nn.Module, optimizer: FlatKFAC, images: Tensor, y: Tensor) -> set[str]:
    """Take a step; return the layers whose radii are now those of these images."""
    penalty(model, optimizer, images, y)
    expected = reference.radii(model, reference.cross_entropy_sum(y), images)
    found = optimizer.radii()
    return {name for name in found if found[name] == pytest.approx(expected[name].item(), rel=1e-9)}


def test_the_first_refresh_after_a_cut_or_its_undoing_looks_at_all_layers_and_the_next_does_not(tmp_path: Path) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, survey_every=100)
    made = partial(NeuronPruner, target=0.4, start=1, events=1, keep_removed=True)
    pruner = made(model, optimizer, x)

    def read(images: Tensor, model: nn.Module = model, optimizer: FlatKFAC = optimizer) -> set[str]:
        return layers_read(model, optimizer, images, y)

    every = read(x)
    assert every == {"0", "2", "4"}
    assert len(read(2 * x)) == 1
    assert pruner.step()
    path = tmp_path / "checkpoint.pt"
    torch.save([pruner.state_dict(), model.state_dict(), optimizer.state_dict()], path)
    assert read(3 * x) == every
    assert len(read(4 * x)) == 1

    resumed = mlp()
    other = plain(resumed, mu=0.3, survey_every=100)
    for part, state in zip((made(resumed, other, x), resumed, other), torch.load(path, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert read(3 * x, resumed, other) == every
    assert len(read(4 * x, resumed, other)) == 1

    pruner.undo()
    assert read(5 * x) == every
    assert len(read(6 * x)) == 1


@pytest.mark.parametrize(("outdated", "read"), [(False, 1), (True, 3)])
def test_undoing_a_cut_before_any_refresh_leaves_layers_as_well_known_as_before_it(outdated: bool, read: int) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, survey_every=100)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, events=1, keep_removed=True)
    assert len(layers_read(model, optimizer, x, y)) == 3
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "kfac_flat": {**state["kfac_flat"], "outdated": outdated}})
    assert pruner.step()
    pruner.undo()
    assert len(layers_read(model, optimizer, 2 * x, y)) == read


def test_a_checkpoint_that_does_not_say_whether_there_was_a_cut_is_read_as_if_there_was() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, survey_every=100)
    layers_read(model, optimizer, x, y)
    state = optimizer.state_dict()
    for old in (state, {**state, "kfac_flat": {k: v for k, v in state["kfac_flat"].items() if k != "outdated"}}):
        optimizer.load_state_dict(old)
        assert len(layers_read(model, optimizer, 2 * x, y)) == (1 if old is state else 3)


def test_an_optimizer_wrapped_after_the_pruner_was_made_goes_on_after_a_cut() -> None:
    model, x = CASES["mlp"].build()
    y = torch.arange(len(x)) % 3
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = NeuronPruner(model, base, x, target=0.5, start=1, every=1, events=1)
    optimizer = FlatKFAC(base, model, mu=0.1, every=2)
    for i in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert i != 2 or pruner.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_flatkfac_wraps_is_refused() -> None:
    model, x = CASES["mlp"].build()
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.01), model)
    with pytest.raises(ValueError, match="give NeuronPruner the FlatKFAC itself"):
        NeuronPruner(model, optimizer.base, x, target=0.5)


def test_of_two_pruners_the_one_that_did_not_cut_says_that_it_is_out_of_date_and_training_goes_on() -> None:
    model, x = CASES["mlp"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    first, second = (
        NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=2, pace="linear") for _ in range(2)
    )
    for i in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
        if i == 0:
            assert first.step()
    with pytest.raises(CutError, match="have been changed by something else"):
        second.step()
    assert first.step()


def test_layers_that_another_optimizer_trains_stay_whole() -> None:
    sizes = [(6, 8), (8, 8), (8, 8), (8, 3)]
    model = nn.Sequential(*(module for size in sizes for module in (nn.Linear(*size), nn.ReLU())))[:-1]
    other = torch.optim.Adam(model[2].parameters())
    own = torch.optim.SGD([p for i in (0, 4, 6) for p in model[i].parameters()], lr=0.1, momentum=0.9)
    pruner = NeuronPruner(model, own, torch.randn(2, 6), target=0.2, start=1, every=1, events=1)
    assert {"0", "2"} <= pruner.frozen.keys()
    for i in range(4):
        own.zero_grad()
        other.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        own.step()
        other.step()
        assert i != 1 or pruner.step()
    assert pruner.widths["0"] == pruner.widths["2"] == 8
    assert pruner.widths["4"] < 8


def test_a_copied_pruner_scores_its_own_model() -> None:
    model, x = CASES["mlp"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=1)
    model2, optimizer2, pruner2 = copy.deepcopy((model, optimizer, pruner))
    F.cross_entropy(model2(x), torch.arange(len(x)) % 3).backward()
    optimizer2.step()
    assert pruner2.step()
    assert not pruner.step()
    assert model[0].weight.shape != model2[0].weight.shape


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_a_model_compiled_behind_the_librarys_back_is_cut_and_trains_on(how: str) -> None:
    model, x = CASES["residual"].build()
    called = torch.compile(model, backend="eager") if how == "torch.compile" else model
    if how == "Module.compile":
        model.compile(backend="eager")
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model, mu=0.1, every=1)
    pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=1)
    for i in range(6):
        optimizer.zero_grad()
        F.cross_entropy(called(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
        assert i != 2 or pruner.step()
    assert optimizer.rho > 0
    torch.compiler.reset()
