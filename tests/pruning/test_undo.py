"""undo() puts the neurons of the last removal back: what went as it went, what stayed as it is now."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn, optim

from kfac_flat import CutError, FlatKFAC, NeuronPruner
from tests.optimizer.loops import norm, penalty, plain
from tests.pruning.nets import CASES
from tests.pruning.test_atomic import Injection, all_there_is, assert_fails_without_a_trace
from tests.pruning.test_surgery import OPTIMIZERS, Setup, assert_same, cut_by_hand, everything, kept, train
from tests.reference import batch, mlp

Make = Callable[..., optim.Optimizer]
SGD = OPTIMIZERS["SGD"]


def build(name: str, make: Make = SGD, kfac: bool = False, events: int = 1) -> Setup:
    model, x = CASES[name].build()
    y = torch.arange(len(x)) % 3
    optimizer = make(model.parameters())
    if kfac:
        optimizer = FlatKFAC(optimizer, model, every=2)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=events, keep_removed=True)
    train(model, optimizer, x, y, 3)
    return model, optimizer, pruner, x, y


def identities(model: nn.Module) -> list[int]:
    return [id(t) for t in (*model.parameters(), *model.buffers())]


def layout(model: nn.Module) -> list[tuple[int, ...]]:
    return [t.stride() for t in (*model.parameters(), *model.buffers())]


NETS = ("mlp", "residual", "depthwise_multiplier", "grouped", "unet", "tied_linears", "permuted_flatten", "conv1d")


@pytest.mark.parametrize("kfac", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_undone_at_once_everything_is_bit_for_bit_as_before(name: str, kfac: bool) -> None:
    run = build(name, kfac=kfac)
    model, optimizer, pruner, x, y = run
    before, same, strides = everything(*run[:3]), identities(model), layout(model)
    plan = pruner.plan()
    assert pruner.step()
    pruner.undo()
    assert_same(everything(*run[:3]), before)
    assert (identities(model), layout(model)) == (same, strides)
    assert pruner.plan().widths_after == plan.widths_after
    other = build(name, kfac=kfac)
    assert train(model, optimizer, x, y, 3) == train(other[0], other[1], x, y, 3)
    assert pruner.step().widths_after == other[2].step().widths_after


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back(name: str) -> None:
    run = build("residual", OPTIMIZERS[name])
    before = everything(*run[:3])
    assert run[2].step()
    run[2].undo()
    assert_same(everything(*run[:3]), before)
    train(run[0], run[1], run[3], run[4], 2)


def test_after_training_on_what_stayed_keeps_its_values_and_what_went_returns_as_it_went() -> None:
    model, optimizer, pruner, x, y = build("residual")
    old = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    momenta = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    assert pruner.step()
    indices = kept(pruner, model)
    train(model, optimizer, x, y, 3)
    new = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    new_momenta = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    pruner.undo()

    def assert_joined(t: Tensor, small: Tensor, whole: Tensor, index: tuple[Tensor, ...]) -> None:
        assert t.shape == whole.shape
        assert torch.equal(cut_by_hand(t, index), small)
        inside = torch.zeros(whole.shape, dtype=torch.bool)
        inside[torch.meshgrid(*index, indexing="ij") if index else ()] = True
        assert torch.equal(t[~inside], whole[~inside])

    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        assert_joined(t.detach(), new[name], old[name], indices.get(name, ()))
    for name, p in model.named_parameters():
        assert_joined(optimizer.state[p]["momentum_buffer"], new_momenta[name], momenta[name], indices[name])
    assert not torch.equal(model[0].weight, old["0.weight"])
    losses = train(model, optimizer, x, y, 20)
    assert losses[-1] < losses[0]


def test_with_curvature_training_goes_on_after_an_undo_that_comes_late() -> None:
    model, optimizer, pruner, x, y = build("residual", kfac=True)
    assert pruner.step()
    train(model, optimizer, x, y, 3)
    pruner.undo()
    for v in optimizer._tracker.eigenvectors.values():
        for vectors in (v.A, v.G):
            assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors), dtype=vectors.dtype))
    for weight, term in optimizer.input_mask_gradients().items():
        assert weight.shape[1] == len(term)
    losses = train(model, optimizer, x, y, 20)
    assert losses[-1] < losses[0]
    assert pruner.step()


def test_an_undo_adds_no_penalty_a_second_time_where_another_layer_attained_the_maximum_since() -> None:
    """Of that layer's removed inputs nothing is known, but the steps until the next refresh have been paid for."""
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.1, every=4)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1, keep_removed=True)
    assert float(norm(penalty(model, optimizer, x, y))) > 0
    first = optimizer._tracker.rho()
    attained = {name for name, radius in optimizer._tracker.radii.items() if radius == first}
    assert pruner.step()
    for _ in range(3):
        penalty(model, optimizer, x, y)
    with torch.no_grad():  # so that the next refreshes find the maximum elsewhere
        for p in model[2].parameters():
            p.mul_(0.05)
        model[4].weight.mul_(10)
    for _ in range(5):
        penalty(model, optimizer, x, y)
    radii = optimizer.radii()
    assert {max(radii, key=lambda name: radii[name])} != attained
    pruner.undo()
    added = [float(norm(penalty(model, optimizer, x, y))) for _ in range(4)]
    assert added[:3] == [0, 0, 0]
    assert added[3] > 0


def test_undone_at_once_the_penalty_at_masks_is_what_it_was_beyond_the_gradients_that_hold_it() -> None:
    for steps in (1, 2):  # the last of which has computed the penalty, or has not
        model, (x, y) = mlp(), batch(8, 4)
        optimizer = plain(model, mu=0.1, every=4)
        pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1, keep_removed=True)
        for _ in range(steps):
            penalty(model, optimizer, x, y)
        before = optimizer.input_mask_gradients()
        assert pruner.step()
        pruner.undo()
        after = optimizer.input_mask_gradients()
        assert after.keys() == before.keys()
        assert all(torch.equal(term, before[weight]) for weight, term in after.items())


def test_a_layer_that_began_to_train_after_the_removal_does_not_stop_the_undo() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.1, every=2)
    pruner = NeuronPruner(model, optimizer, x, target=0.4, start=1, every=1, events=1, keep_removed=True)
    model[2].weight.requires_grad_(False)
    penalty(model, optimizer, x, y)
    model[2].weight.requires_grad_(True)
    penalty(model, optimizer, x, y)
    assert model[2].weight not in optimizer.input_mask_gradients()
    assert pruner.step()
    penalty(model, optimizer, x, y)
    assert model[2].weight in optimizer.input_mask_gradients()
    pruner.undo()
    for _ in range(2):
        penalty(model, optimizer, x, y)
    assert len(optimizer.input_mask_gradients()[model[2].weight]) == model[2].in_features


def test_only_the_last_removal_can_be_undone_and_only_once() -> None:
    model, optimizer, pruner, x, y = build("mlp", events=2)
    assert pruner.step()
    train(model, optimizer, x, y, 2)
    before = everything(model, optimizer, pruner)
    assert pruner.step()
    pruner.undo()
    assert_same(everything(model, optimizer, pruner), before)
    with pytest.raises(CutError, match="nothing to undo: only the last removal"):
        pruner.undo()
    assert_same(everything(model, optimizer, pruner), before)


def test_nothing_to_undo_says_what_to_do() -> None:
    _, _, pruner, _, _ = build("mlp")
    with pytest.raises(CutError, match="nothing to undo"):
        pruner.undo()
    model, x = CASES["mlp"].build()
    without = NeuronPruner(model, SGD(model.parameters()), x, target=0.4)
    with pytest.raises(CutError, match="make the pruner with keep_removed=True"):
        without.undo()


def test_a_copy_of_the_pruner_undoes_nothing_of_the_originals() -> None:
    run = build("mlp")
    assert run[2].step()
    pruner = copy.deepcopy(run[:3])[2]
    before = everything(*run[:3])
    with pytest.raises(CutError, match="nothing to undo"):
        pruner.undo()
    assert_same(everything(*run[:3]), before)


def test_state_that_began_after_the_removal_refuses_the_undo_and_nothing_changes() -> None:
    model, optimizer, pruner, x, y = build("mlp", OPTIMIZERS["SGD without momentum"])
    assert pruner.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, x, y, 1)
    before = everything(model, optimizer, pruner)
    with pytest.raises(CutError, match=r"keeps 'momentum_buffer' for 0\.weight only since neurons went"):
        pruner.undo()
    assert_same(everything(model, optimizer, pruner), before)


def test_an_undo_that_fails_at_any_stage_has_not_happened() -> None:
    run, undisturbed = build("mlp", kfac=True), build("mlp", kfac=True)
    for setup in (run, undisturbed):
        assert setup[2].step()
    listening = Injection()
    listening.during(undisturbed[2].undo)
    assert assert_fails_without_a_trace(run[2].undo, run, listening.events) > 100
    run[2].undo()
    assert_same(everything(*run[:3]), everything(*undisturbed[:3]))
    assert all_there_is(*run[:3])["strides"] == all_there_is(*undisturbed[:3])["strides"]
