"""A pruner's state is plain numbers; with it a fresh dense model becomes the pruned one and training goes on."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from kfac_flat import CutError, FlatKFAC, NeuronPruner, shrink
from kfac_flat.pruning.layers import channel_counts
from tests.pruning.masking import LAYERS, prune_at_random, pruner_for
from tests.pruning.nets import CASES

OPTIONS = {"target": 0.6, "start": 1, "every": 1, "events": 3, "pace": "linear"}
Run = tuple[nn.Module, optim.Optimizer, NeuronPruner, nn.Module]


def start(name: str, kfac: bool, seed: int = 0) -> tuple[Run, Tensor, Tensor]:
    model, x = CASES[name].build(seed)
    criterion = nn.CrossEntropyLoss()
    optimizer: optim.Optimizer = optim.Adam(model.parameters(), lr=0.01)
    if kfac:
        optimizer = FlatKFAC(optimizer, model, mu=0.05, every=2)
    pruner = NeuronPruner(model, optimizer, x, **OPTIONS)
    return (model, optimizer, pruner, criterion), x, torch.arange(len(x)) % 3


def epoch(run: Run, x: Tensor, y: Tensor, steps: int = 3) -> list[float]:
    model, optimizer, _, criterion = run
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def checkpoint(run: Run) -> dict[str, Any]:
    model, optimizer, pruner, _ = run
    return through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    )


def resume(run: Run, saved: dict[str, Any]) -> None:
    model, optimizer, pruner, _ = run
    pruner.load_state_dict(saved["pruner"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


@pytest.mark.parametrize("cuts", [0, 1, 2])
@pytest.mark.parametrize("kfac", [False, True])
@pytest.mark.parametrize("name", ["mlp", "residual", "depthwise_multiplier"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(name: str, kfac: bool, cuts: int) -> None:
    run, x, y = start(name, kfac)
    for _ in range(cuts):
        epoch(run, x, y)
        assert run[2].step()
    epoch(run, x, y, steps=1)  # in the middle of an epoch: scores and the penalty's gradient are on their way
    saved = checkpoint(run)
    other, _, _ = start(name, kfac, seed=7)
    epoch(other, x, y, steps=0)
    resume(other, saved)
    assert other[2].size == run[2].size
    assert other[2].widths == run[2].widths
    assert other[2].sparsity == run[2].sparsity
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(run[0])(x), copy.deepcopy(other[0])(x))
    for _ in range(3 - cuts):
        assert epoch(run, x, y) == epoch(other, x, y)
        ours, theirs = run[2].step(), other[2].step()
        assert ours
        assert (ours.epoch, ours.widths_after, ours.after) == (theirs.epoch, theirs.widths_after, theirs.after)
        assert {n: t.tolist() for n, t in ours.removed.items()} == {n: t.tolist() for n, t in theirs.removed.items()}
    assert epoch(run, x, y) == epoch(other, x, y)
    assert run[2].finished
    assert other[2].finished
    for p, q in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_state_holds_plain_indices_into_the_original_layers() -> None:
    model, inputs = CASES["residual"].build()
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, (*LAYERS, nn.BatchNorm2d))}
    dense = copy.deepcopy(model).state_dict()
    pruner = pruner_for(model, inputs, target=0.6, events=3)
    for event in range(3):
        prune_at_random(pruner, model, seed=event)
        layers = through_a_file(pruner.state_dict())["layers"]
        assert layers.keys() == shapes.keys()
        for name, entry in layers.items():
            assert entry.keys() == {"in", "out"}
            weight, original = model.get_submodule(name).weight, dense[f"{name}.weight"]
            for positions in entry.values():
                assert positions.dtype == torch.int64
                assert positions.device.type == "cpu"
                assert positions.tolist() == sorted(set(positions.tolist()))
            expected = original[entry["out"]]
            if original.dim() > 1:
                expected = expected[:, entry["in"]]
            assert torch.equal(weight, expected)  # lr = 0: the weights are the original ones


@pytest.mark.parametrize("name", CASES)
def test_shrink_makes_a_fresh_model_that_the_pruned_weights_load_into(name: str) -> None:
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs)
    prune_at_random(pruner, model)
    fresh, _ = CASES[name].build(seed=3)
    manifest = through_a_file({"layers": pruner.state_dict()["layers"]})
    assert shrink(fresh, manifest) is fresh
    fresh.load_state_dict(model.state_dict())
    assert repr(fresh) == repr(model)
    assert sum(p.numel() for p in fresh.parameters()) == pruner.size.parameters


def snapshot(model: nn.Module, pruner: NeuronPruner) -> tuple[Any, ...]:
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return repr(model), tensors, pruner.widths, pruner.size, copy.deepcopy(pruner.state_dict())


def assert_unchanged(model: nn.Module, pruner: NeuronPruner, before: tuple[Any, ...]) -> None:
    after = snapshot(model, pruner)
    assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(t, before[1][name]) for name, t in after[1].items())
    for name, entry in after[4]["layers"].items():
        assert all(torch.equal(entry[k], before[4]["layers"][name][k]) for k in ("in", "out"))
    assert (after[4]["epoch"], after[4]["event"]) == (before[4]["epoch"], before[4]["event"])


def pruned_state(name: str, seed: int = 0, **options: Any) -> dict[str, Any]:
    model, inputs = CASES[name].build()
    pruner = pruner_for(model, inputs, **options)
    prune_at_random(pruner, model, seed)
    return pruner.state_dict()


def wider_mlp() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))
    pruner = pruner_for(model, torch.randn(2, 6), target=0.1)
    prune_at_random(pruner, model)
    return pruner.state_dict()


def untied() -> dict[str, Any]:
    state = pruned_state("mlp")
    state["layers"]["2"]["in"] = torch.arange(len(state["layers"]["2"]["in"]))
    state["layers"]["0"]["out"] = torch.arange(10)[-len(state["layers"]["0"]["out"]) :]
    return state


def without(key: str) -> dict[str, Any]:
    state = pruned_state("mlp")
    del state[key]
    return state


def with_other_scores() -> dict[str, Any]:
    state = pruned_state("mlp")
    state["saliency"]["total"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pruned_state("cnn_flatten"), "the state belongs to another model"),
        (wider_mlp, "the state keeps channels of 0 that this model no longer has"),
        (untied, "the state keeps other channels of"),
        (lambda: without("layers"), "layers"),
        (lambda: without("saliency"), "saliency"),
        (lambda: without("epoch"), "epoch"),
        (with_other_scores, "saliency|scores"),
        (lambda: CASES["mlp"].build()[0].state_dict(), "layers"),
    ],
    ids=["another model", "wider", "untied", "no layers", "no saliency", "no epoch", "other scores", "model's state"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(make: Any, message: str) -> None:
    model, inputs = CASES["mlp"].build()
    pruner = pruner_for(model, inputs)
    state = make()
    before = snapshot(model, pruner)
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(state)
    assert_unchanged(model, pruner, before)
    prune_at_random(pruner, model)


def test_an_already_cut_model_is_refused_and_nothing_changes() -> None:
    model, inputs = CASES["residual"].build()
    pruner = pruner_for(model, inputs, events=2)
    prune_at_random(pruner, model, seed=1)
    before = snapshot(model, pruner)
    with pytest.raises(ValueError, match=r"load it into the dense model|other channels"):
        pruner.load_state_dict(pruned_state("residual", seed=0, events=1))
    assert_unchanged(model, pruner, before)


def test_weights_of_the_dense_model_do_not_load_into_the_pruned_one_and_the_other_way_round() -> None:
    run, x, y = start("mlp", kfac=True)
    epoch(run, x, y)
    dense = checkpoint(run)
    run[2].step()
    epoch(run, x, y)
    pruned = checkpoint(run)
    fresh, _, _ = start("mlp", kfac=True)
    with pytest.raises(ValueError, match="load the pruner's state into the dense model first"):
        fresh[1].load_state_dict(pruned["optimizer"])
    with pytest.raises(ValueError, match="load the pruner's state into the dense model first"):
        run[1].load_state_dict(dense["optimizer"])


@pytest.mark.parametrize("name", ["cnn_flatten", "residual"])
def test_shrink_refuses_another_models_manifest_and_nothing_changes(name: str) -> None:
    model, _ = CASES["mlp"].build()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(CutError, match=r"does not have|no channels|fewer than the manifest keeps"):
        shrink(model, pruned_state(name))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_shrink_refuses_a_model_that_is_too_small_and_nothing_changes() -> None:
    manifest = pruned_state("mlp")
    model, _ = CASES["mlp"].build()
    shrink(model, manifest)
    before = repr(model)
    with pytest.raises(CutError, match="fewer than the manifest keeps: is it the dense model"):
        shrink(model, manifest)
    assert repr(model) == before


def test_shrink_refuses_what_is_no_manifest() -> None:
    model, _ = CASES["mlp"].build()
    with pytest.raises(CutError, match="layers"):
        shrink(model, model.state_dict())


@pytest.mark.parametrize(
    ("module", "side", "positions", "message"),
    [
        (nn.Linear(3, 4), "out", [1, 0], "no ascending int64 positions"),
        (nn.Linear(3, 4), "in", [1, 1], "no ascending int64 positions"),
        (nn.Linear(3, 4), "in", [-1, 0], "no ascending int64 positions"),
        (nn.Linear(3, 4), "out", [0.0, 1.0], "no ascending int64 positions"),
        (nn.Linear(3, 4), "out", [0, 4], "has 4 output channels, fewer than the manifest keeps"),
        (nn.Conv2d(4, 6, 1, groups=2), "out", [0, 1, 3], "would have outputs of unequal number"),
        (nn.Conv2d(4, 6, 1, groups=2), "in", [0, 3], "would lose different input channels"),
        (nn.GroupNorm(2, 4), "out", [0, 1, 2], "would be cut in part"),
        (nn.MultiheadAttention(4, 2), "out", [0, 4, 8], "would be cut in part"),
        (nn.MultiheadAttention(4, 2), "out", [0, 1, 6, 7, 8, 9], "would lose different heads"),
    ],
)
def test_shrink_refuses_positions_that_no_cut_leaves_and_nothing_changes(
    module: nn.Module, side: str, positions: list[float], message: str
) -> None:
    model = nn.Sequential(module)
    before, shape = copy.deepcopy(model.state_dict()), repr(model)
    kept = {key: torch.arange(n) for key, n in zip(("in", "out"), channel_counts(module), strict=True)}
    with pytest.raises(CutError, match=message):
        shrink(model, {"layers": {"0": kept | {side: torch.tensor(positions)}}})
    assert repr(model) == shape
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
