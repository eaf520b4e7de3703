"""Copies of the model, such as averages, are cut along with it, or nothing is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kfac_flat import CutError, NeuronPruner
from kfac_flat.changes import Change
from tests.pruning.by_hand import WIDTHS, Before, Remaining, assert_same_tensors, batch, network, pruner_of, train
from tests.pruning.test_surgery import Failure, assert_same

Run = tuple[nn.Module, optim.Optimizer, AveragedModel]


def average_of(model: nn.Module, use_buffers: bool = False) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)


def start(widths: dict[str, int] = WIDTHS, use_buffers: bool = False) -> Run:
    torch.manual_seed(0)
    model = network(widths)
    return model, optim.SGD(model.parameters(), lr=0.05, momentum=0.9), average_of(model, use_buffers)


def train_averaged(run: Run, x: Tensor, y: Tensor, steps: int) -> None:
    model, optimizer, average = run
    for _ in range(steps):
        train(model, optimizer, x, y, 1)
        average.update_parameters(model)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_of_a_cut_trajectory_is_that_of_a_model_built_small(use_buffers: bool) -> None:
    x, y = batch()
    run = start(use_buffers=use_buffers)
    model, optimizer, average = run
    pruner = pruner_of(model, optimizer, x, copies=[average])
    train_averaged(run, x, y, 3)
    before, averages = Before.of(model, optimizer), copy.deepcopy(average.state_dict())
    mine = [id(p) for p in average.parameters()]
    assert pruner.step()
    assert [id(p) for p in average.parameters()] == mine
    left = Remaining.after(pruner)

    reference = start(left.widths, use_buffers)
    small, other, expected = reference
    small.load_state_dict(left.of_all(before.model))
    other.load_state_dict(before.optimizer_state(left))
    expected.n_averaged.copy_(averages.pop("n_averaged"))
    expected.module.load_state_dict(left.of_all({n.removeprefix("module."): t for n, t in averages.items()}))
    assert_same_tensors(average, expected)
    for either in (run, reference):
        train_averaged(either, x, y, 4)
    assert_same_tensors(model, small)
    assert_same_tensors(average, expected)
    assert torch.equal(average(x), expected(x))
    assert not torch.equal(average(x), model(x))
    assert repr(average) == repr(expected)


def test_copies_in_other_wrappers_precisions_and_modes_are_cut_to_the_same_shapes() -> None:
    x, y = batch()
    model, optimizer, average = start()
    teacher = copy.deepcopy(model).double().eval().requires_grad_(False)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    pruner = pruner_of(model, optimizer, x, copies=(m for m in (average, teacher, compiled)), events=2)
    for _ in range(2):
        train(model, optimizer, x, y, 1)
        assert pruner.step()
        shapes = [p.shape for p in model.parameters()]
        for other in (average, teacher, compiled):
            assert [p.shape for p in other.parameters()] == shapes
    assert {t.dtype for t in teacher.parameters()} == {torch.float64}
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher(x.double()).shape == average(x).shape == (len(x), 3)


def test_a_resumed_pruner_cuts_the_fresh_copies_too() -> None:
    x, y = batch()
    run = start()
    pruner = pruner_of(run[0], run[1], x, copies=[run[2]])
    train_averaged(run, x, y, 2)
    assert pruner.step()
    train_averaged(run, x, y, 1)
    model, optimizer, average = other = start()
    again = pruner_of(model, optimizer, x, copies=[average])
    again.load_state_dict(pruner.state_dict())
    for ours, theirs in zip(other, run, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for either in (run, other):
        train_averaged(either, x, y, 2)
    assert_same_tensors(average, run[2])
    assert_same_tensors(model, run[0])


def test_a_copy_that_is_the_model_itself_or_shares_its_parameters_is_cut_once() -> None:
    x, y = batch()
    model, optimizer, _ = start()
    shared = network()
    for ours, theirs in zip(shared.modules(), model.modules(), strict=True):
        ours._parameters.update(theirs._parameters)
    pruner = pruner_of(model, optimizer, x, copies=[model, shared])
    train(model, optimizer, x, y, 1)
    assert pruner.step()
    assert all(p is q for p, q in zip(shared.parameters(), model.parameters(), strict=True))
    assert torch.equal(shared(x), model(x))


def everything(run: Run, pruner: NeuronPruner) -> dict[str, Any]:
    model, _, average = run
    modules = [*model.modules(), *average.modules()]
    return copy.deepcopy(
        {
            "states": [o.state_dict() for o in (*run, pruner)],
            "attributes": [{k: v for k, v in vars(m).items() if isinstance(v, (int, bool))} for m in modules],
            "gradients": [p.grad for p in (*model.parameters(), *average.parameters())],
            "widths": pruner.widths,
        }
    )


@pytest.mark.parametrize("at", [1, 9, 10, 12, 18])
def test_a_failure_in_the_middle_rolls_back_the_model_and_every_copy(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    run = start()
    pruner = pruner_of(run[0], run[1], x, copies=[run[2]])
    train_averaged(run, x, y, 2)
    before = everything(run, pruner)
    failure = Failure(at, RuntimeError)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils, "swap_tensors", failure)
        with pytest.raises(CutError, match=r"of copies\[0\] cannot be cut.*injected" if at > 11 else "injected"):
            pruner.step()
    assert failure.calls == 2 * at - 1
    assert_same(everything(run, pruner), before)
    twin = copy.deepcopy(run)
    for either in (run, twin):
        train_averaged(either, x, y, 2)
    assert_same_tensors(run[2], twin[2])
    assert pruner.step()
    train_averaged(run, x, y, 1)


def test_a_failure_after_the_last_exchange_rolls_back_all_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch()
    run = start()

    def prepare_cut(kept: object, select: object) -> list[Change]:
        def commit() -> None:
            assert run[0][0].out_channels < WIDTHS["0"]
            assert len(run[2].module[0].weight) < WIDTHS["0"]
            raise MemoryError("injected")

        return [Change(commit, lambda: None)]

    pruner = pruner_of(run[0], run[1], x, copies=[run[2]])
    train_averaged(run, x, y, 2)
    before = everything(run, pruner)
    with monkeypatch.context() as patch:
        patch.setattr(run[1], "prepare_cut", prepare_cut, raising=False)
        with pytest.raises(MemoryError, match="injected"):
            pruner.step()
    assert_same(everything(run, pruner), before)
    train_averaged(run, x, y, 1)
    assert pruner.step()


def test_a_graph_through_the_copy_that_is_still_alive_refuses_the_cut_by_name_and_nothing_changes() -> None:
    x, y = batch()
    run = start()
    pruner = pruner_of(run[0], run[1], x, copies=[run[2]])
    train_averaged(run, x, y, 2)
    before = everything(run, pruner)
    pending = run[2](x).sum()
    before["states"][2] = copy.deepcopy(run[2].state_dict())  # its BatchNorm has seen another batch
    with pytest.raises(CutError, match=r"0\.weight of copies\[0\] cannot be cut while"):
        pruner.step()
    assert_same(everything(run, pruner), before)
    pending.backward()
    del pending
    assert pruner.step()


def wider() -> nn.Module:
    return network({**WIDTHS, "3": 9})


def with_another_activation() -> nn.Module:
    model = network()
    model[8] = nn.Sigmoid()
    return model


def without_bias() -> nn.Module:
    model = network()
    model[9] = nn.Linear(7, 3, bias=False)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (wider, ValueError, r"copies\[1\] is no copy of the model: 3 is a Conv2d .*9, 6, 3, 3.* and not .*8, 6, 3, 3"),
        (with_another_activation, ValueError, r"8 is a Sigmoid \(no tensors\) and not a Tanh"),
        (without_bias, ValueError, r"9 is a Linear .* and not a Linear .*bias"),
        (lambda: nn.Sequential(*network()[:9]), ValueError, "only one of them has '9'"),
        (lambda: average_of(average_of(network())), ValueError, "no copy of the model"),
        (lambda: network().state_dict(), TypeError, r"copies\[1\] must be a torch.nn.Module, not OrderedDict"),
    ],
    ids=["wider", "other activation", "no bias", "shorter", "wrapped twice", "state dict"],
)
def test_what_is_no_copy_is_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    model, optimizer, average = start()
    with pytest.raises(error, match=message):
        pruner_of(model, optimizer, batch()[0], copies=[average, make()])


def test_a_single_copy_that_is_in_no_collection_is_refused() -> None:
    model, optimizer, _ = start()
    with pytest.raises(TypeError, match=r"copies must be a collection of models, such as \[Sequential"):
        pruner_of(model, optimizer, batch()[0], copies=network())


def test_a_copy_that_has_changed_since_is_refused_at_the_cut_and_nothing_changes() -> None:
    x, y = batch()
    run = start()
    pruner = pruner_of(run[0], run[1], x, copies=[run[2]])
    train_averaged(run, x, y, 2)
    run[2].module[9] = nn.Linear(7, 4)
    before = everything(run, pruner)
    with pytest.raises(CutError, match=r"copies\[0\] is no copy of the model any more: 9 is a Linear"):
        pruner.step()
    assert_same(everything(run, pruner), before)
