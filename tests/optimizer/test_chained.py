"""Several optimizers chained do what they do one after the other, and whoever is given the chain sees all of them."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from baselines import SAM
from kfac_flat import ChainedOptimizer, FlatKFAC, NeuronPruner
from tests.optimizer.loops import small_net, step
from tests.reference import batch


def members(model: nn.Module) -> list[Optimizer]:
    """Matrices by one rule and all else by another, the matrices in two groups."""
    first, *others = (p for p in model.parameters() if p.dim() == 2)
    matrices = [{"params": [first]}, {"params": others, "lr": 0.02}]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [SGD(matrices, lr=0.1, momentum=0.9), AdamW(vectors, lr=0.01)]


def chained(model: nn.Module) -> ChainedOptimizer:
    return ChainedOptimizer(members(model))


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        step(model, optimizer, batch(8, 4, seed=seed, dtype=torch.float32)[0])


def numbers(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# ---------------------------------------------------------------- the same steps


def test_the_trajectory_is_that_of_stepping_one_after_the_other() -> None:
    model, other = small_net(), small_net()
    start = numbers(model)
    train(model, chained(model), 5)
    own = members(other)
    for seed in range(5):
        x = batch(8, 4, seed=seed, dtype=torch.float32)[0]
        for optimizer in own:
            optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), torch.arange(8) % 3).backward()
        for optimizer in own:
            optimizer.step()
    assert equal(numbers(model), numbers(other))
    assert not any(map(torch.equal, numbers(model), start))


def test_a_closure_is_called_once_and_its_loss_comes_back() -> None:
    model, other = small_net(), small_net()
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    optimizer, losses = chained(model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    step(other, chained(other), x)
    assert len(losses) == 1
    assert equal(numbers(model), numbers(other))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_all(set_to_none: bool) -> None:
    model = small_net()
    optimizer = chained(model)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())


def test_zero_grad_sets_to_none_unless_told_otherwise() -> None:
    model = small_net()
    optimizer = chained(model)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_run_before_any_optimizer_steps_and_after_all_have() -> None:
    model = small_net()
    optimizer, seen = chained(model), []
    start = numbers(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append([torch.equal(p, q) for p, q in pairs(model, start)]))
    optimizer.register_step_post_hook(lambda *_: seen.append([torch.equal(p, q) for p, q in pairs(model, start)]))
    train(model, optimizer, 1)
    assert seen == [[True] * 4, [False] * 4]


def pairs(model: nn.Module, other: list[Tensor]) -> zip[tuple[nn.Parameter, Tensor]]:
    return zip(model.parameters(), other, strict=True)


# ---------------------------------------------------------------- what others ask an optimizer


def test_groups_and_state_are_the_optimizers_own() -> None:
    model = small_net()
    optimizer = chained(model)
    first, second = optimizer.optimizers
    assert [id(g) for g in optimizer.param_groups] == [id(g) for g in first.param_groups + second.param_groups]
    train(model, optimizer, 1)
    p, q = model[0].weight, model[0].bias
    assert optimizer.state[p] is first.state[p]
    assert optimizer.state[q] is second.state[q]
    assert set(optimizer.state) == set(model.parameters())
    assert len(optimizer.state) == 4
    del optimizer.state[q]
    assert q not in second.state
    assert q not in optimizer.state
    assert optimizer.state.get(q) is None
    assert q not in second.state  # asking made none
    optimizer.state[q] = {"step": torch.tensor(3.0)}
    assert second.state[q] == {"step": torch.tensor(3.0)}
    assert q not in first.state
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.zeros(1))]
    r = model[2].bias
    assert optimizer.state.get(nn.Parameter(torch.zeros(1)), 7) == 7
    kept = second.state[r]
    assert optimizer.state.pop(r) is kept
    assert r not in second.state
    assert optimizer.state.pop(r, None) is None
    with pytest.raises(KeyError):
        optimizer.state.pop(r)
    assert optimizer.state.setdefault(r, {"a": 1}) == second.state[r] == {"a": 1}
    assert repr(optimizer.state) == repr(dict(optimizer.state))


def test_parts_are_stepped_in_their_order() -> None:
    model = small_net()
    optimizer, order = chained(model), []
    for part in optimizer.optimizers:
        part.register_step_post_hook(lambda stepped, *_: order.append(stepped))
    train(model, optimizer, 1)
    assert order == list(optimizer.optimizers)
    assert list(optimizer.state) == [*optimizer.optimizers[0].state, *optimizer.optimizers[1].state]


def test_defaults_are_those_that_all_have_alike() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    alike = ChainedOptimizer([SGD([a], lr=0.1, momentum=0.9), SGD([b], lr=0.2, momentum=0.9)])
    assert alike.defaults["momentum"] == 0.9
    assert "lr" not in alike.defaults
    different = ChainedOptimizer([SGD([a], lr=0.1, momentum=0.9), Adam([c])])
    assert not {"momentum", "betas"} & different.defaults.keys()
    with pytest.raises(ValueError, match="momentum"):
        OneCycleLR(different, 0.1, total_steps=5)  # which cycles one of the two


@pytest.mark.parametrize("of_all", [True, False])
def test_schedulers_of_the_chain_and_of_one_optimizer(of_all: bool) -> None:
    model = small_net()
    optimizer = chained(model)
    scheduler = CosineAnnealingLR(optimizer if of_all else optimizer.optimizers[1], 4)
    for _ in range(2):
        train(model, optimizer, 1)
        scheduler.step()
    first, second, third = (group["lr"] for group in optimizer.param_groups)
    half = 0.5 if of_all else 1.0
    assert (first, second, third) == pytest.approx((0.1 * half, 0.02 * half, 0.005))


def test_a_gradient_scaler_unscales_all_and_leaves_out_a_step_of_all() -> None:
    model, other = small_net(), small_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, plain = chained(model), chained(other)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    for bad in (False, True):
        before = numbers(model)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if bad:
            model[2].bias.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert equal(numbers(model), before)
    step(other, plain, x)
    assert equal(numbers(model), numbers(other))


def test_printing_names_all_groups() -> None:
    assert repr(chained(small_net())).count("Parameter Group") == 3


# ---------------------------------------------------------------- checkpoints and copies


def test_a_checkpoint_has_the_form_of_one_optimizers_and_goes_on_bit_for_bit() -> None:
    model = small_net()
    optimizer = chained(model)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1].keys() == {"state", "param_groups"}
    assert [g["params"] for g in saved[1]["param_groups"]] == [[0], [1], [2, 3]]
    other = small_net()
    fresh = chained(other)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, 3, start=3)
    assert equal(numbers(model), numbers(other))
    assert [g["lr"] for g in fresh.param_groups] == [0.1, 0.02, 0.01]


def test_each_part_gets_its_own_state_and_no_other() -> None:
    model, other = small_net(), small_net()
    optimizer, fresh = chained(model), chained(other)
    train(model, optimizer, 1)
    fresh.load_state_dict(optimizer.state_dict())
    assert [len(part.state) for part in fresh.optimizers] == [2, 2]
    assert len(fresh.state) == 4


def test_a_checkpoint_that_one_part_refuses_changes_none() -> None:
    model, other = small_net(), small_net()
    optimizer = chained(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    groups = [{"params": group["params"]} for group in chained(other).param_groups]
    single = SGD(groups, lr=0.7, momentum=0.9)
    train(other, single, 1)
    with pytest.raises(KeyError):  # AdamW finds no step in it
        optimizer.load_state_dict(single.state_dict())
    train(model, optimizer, 1, start=2)
    again = small_net()
    its = chained(again)
    train(again, its, 3)
    assert equal(numbers(model), numbers(again))
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]


def test_hooks_on_checkpoints_belong_to_the_chain() -> None:
    model = small_net()
    optimizer, order = chained(model), []
    optimizer.register_state_dict_pre_hook(lambda *_: order.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: order.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: order.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert order == ["save", "saved", "load", "loaded"]
    handle = optimizer.optimizers[1].register_state_dict_post_hook(lambda *_: None)
    with pytest.raises(TypeError, match="AdamW keeps more than its parameters' state, or has hooks"):
        optimizer.state_dict()
    handle.remove()
    optimizer.optimizers[0].state["calls"] = 3
    with pytest.raises(TypeError, match="SGD keeps more"):
        optimizer.state_dict()


def test_a_hook_may_change_what_is_loaded() -> None:
    model = small_net()
    optimizer = chained(model)
    saved = optimizer.state_dict()

    def doubled(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 2 * group["lr"]} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.04, 0.02]


def test_a_checkpoint_of_other_optimizers_is_refused_and_changes_nothing() -> None:
    model = small_net()
    optimizer = chained(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = ChainedOptimizer(list(reversed(members(model))))
    with pytest.raises(ValueError, match="parameter groups are not those of the chained optimizers"):
        optimizer.load_state_dict(wrong.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert all(
            torch.equal(torch.as_tensor(t), torch.as_tensor(after["state"][number][k])) for k, t in state.items()
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_by_themselves(copied: Callable[[Any], Any]) -> None:
    model = small_net()
    optimizer = chained(model)
    train(model, optimizer, 2)
    at = numbers(model)
    other, its = copied((model, optimizer))
    with pytest.raises(ValueError, match="give NeuronPruner the ChainedOptimizer itself"):
        NeuronPruner(other, its.optimizers[1], torch.randn(1, 4), target=0.5)
    train(other, its, 2, start=2)
    assert equal(numbers(model), at)
    train(model, optimizer, 2, start=2)
    assert equal(numbers(model), numbers(other))
    assert not equal(numbers(model), at)


# ---------------------------------------------------------------- with this library's own


def test_the_penalty_reaches_the_parameters_of_all() -> None:
    model = small_net()
    optimizer = FlatKFAC(chained(model), model, mu=0.3, every=1)
    start, x = numbers(model), torch.randn(8, 4)
    step(model, optimizer, x)
    other = small_net()
    single = FlatKFAC(SGD(other.parameters(), lr=0.0), other, mu=0.3, every=1)
    step(other, single, x)
    assert_close(model, other)
    bare = small_net()
    step(bare, chained(bare), x)
    for p, q in zip(model[0].parameters(), bare[0].parameters(), strict=True):  # a matrix and a vector
        assert not torch.allclose(p.grad, q.grad, rtol=0.1)
    assert not any(map(torch.equal, numbers(model), start))


def test_the_penalty_off_leaves_the_chains_own_trajectory() -> None:
    model, other = small_net(), small_net()
    train(model, FlatKFAC(chained(model), model, mu=0.0), 4)
    train(other, chained(other), 4)
    assert equal(numbers(model), numbers(other))


def test_flatkfac_around_a_chain_resumes_bit_for_bit() -> None:
    model = small_net()
    optimizer = FlatKFAC(chained(model), model, mu=0.3, every=2)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = small_net()
    fresh = FlatKFAC(chained(other), other, mu=0.3, every=2)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, 3, start=3)
    assert equal(numbers(model), numbers(other))


def test_sam_steps_a_chain() -> None:
    criterion, model, other = nn.CrossEntropyLoss(), small_net(), small_net()
    start, x, y = numbers(model), torch.randn(8, 4), torch.arange(8) % 3
    for m, base in ((model, chained(model)), (other, SGD(other.parameters(), lr=0.0))):
        optimizer = SAM(base, m, criterion=criterion)
        criterion(m(x), y).backward()
        optimizer.step()
    assert_close(model, other)
    assert not any(map(torch.equal, numbers(model), start))


def assert_close(model: nn.Module, other: nn.Module) -> None:
    """Compare gradients, which the parameters' order changes in their last bits."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-7)


def test_a_pruner_given_one_of_several_names_the_chain() -> None:
    model = small_net()
    optimizer = chained(model)
    with pytest.raises(ValueError, match="give NeuronPruner the ChainedOptimizer itself"):
        NeuronPruner(model, optimizer.optimizers[0], torch.randn(1, 4), target=0.5)
    wrapped = FlatKFAC(optimizer, model)
    for inner in (optimizer, *optimizer.optimizers):
        with pytest.raises(ValueError, match="give NeuronPruner the FlatKFAC itself"):
            NeuronPruner(model, inner, torch.randn(1, 4), target=0.5)
    assert not NeuronPruner(model, wrapped, torch.randn(1, 4), target=0.5).frozen.keys() - {"2"}


def test_a_pruner_scores_as_with_a_single_optimizer() -> None:
    kept = []
    for make in (chained, lambda m: SGD(m.parameters(), lr=0.1)):
        model = small_net()
        optimizer = make(model)
        pruner = NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, events=1)
        step(model, optimizer, batch(8, 4, dtype=torch.float32)[0])
        assert pruner.step()
        kept.append(pruner.survivors["0"])
    assert torch.equal(*kept)


# ---------------------------------------------------------------- what is refused


def test_kinds_that_cannot_be_chained() -> None:
    model = small_net()
    matrices, vectors = members(model)

    class OwnForm(SGD):
        def state_dict(self) -> dict[str, Any]:
            return {}

    refused: list[tuple[list[Any], str]] = [
        ([matrices, model], "not Sequential"),
        ([matrices, SGD], "not type"),
        ([FlatKFAC(members(model)[0], model), vectors], "wrap the ChainedOptimizer"),
        ([ChainedOptimizer([members(model)[0]]), vectors], "chain the optimizers inside it"),
        ([LBFGS([model[0].weight]), vectors], "LBFGS evaluates the loss several times"),
        ([OwnForm([model[0].weight]), vectors], "checkpoints of its own form"),
    ]
    for optimizers, message in refused:
        with pytest.raises(TypeError, match=message):
            ChainedOptimizer(optimizers)


def test_none_and_shared_parameters_are_refused() -> None:
    model = small_net()
    with pytest.raises(ValueError, match="no optimizer"):
        ChainedOptimizer([])
    with pytest.raises(ValueError, match="hold the same parameter"):
        ChainedOptimizer([SGD(model.parameters(), lr=0.1), AdamW([model[0].bias])])


def test_a_chain_wants_a_list() -> None:
    with pytest.raises(TypeError, match="takes a list"):
        ChainedOptimizer(SGD(small_net().parameters(), lr=0.1))  # type: ignore[arg-type]


def test_what_another_library_wraps_is_refused() -> None:
    class Prepared(SGD):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(TypeError, match="give ChainedOptimizer the optimizer inside"):
        ChainedOptimizer([Prepared([nn.Parameter(torch.zeros(1))], lr=0.1)])


def test_a_part_that_is_wrapped_and_a_wrapper_of_a_part_are_refused() -> None:
    model = small_net()
    matrices, vectors = members(model)
    wrapped = FlatKFAC(matrices, model)
    with pytest.raises(TypeError, match="is wrapped already"):
        ChainedOptimizer([matrices, vectors])
    del wrapped
    optimizer = ChainedOptimizer([matrices, vectors])
    for part in optimizer.optimizers:
        with pytest.raises(TypeError, match="one of several in a ChainedOptimizer: give FlatKFAC all of these"):
            FlatKFAC(part, model)
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None
    assert FlatKFAC(vectors, model)


def test_a_group_is_added_to_one_of_the_optimizers() -> None:
    model = small_net()
    optimizer = chained(model)
    more = {"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5}
    with pytest.raises(TypeError, match="add the group to one of its optimizers"):
        optimizer.add_param_group(more)
    optimizer.optimizers[0].add_param_group(more)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02, 0.5, 0.01]
