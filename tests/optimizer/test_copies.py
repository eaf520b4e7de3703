"""Copies of model and optimizer go on alike and apart."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    criterion_of,
    gradients,
    plain,
    same,
    snapshot,
    train,
)
from tests.optimizer.resumable import SHAPE, fresh
from tests.reference import batch, mlp


def pickled(pair: tuple[nn.Module, FlatKFAC]) -> Any:
    return pickle.loads(pickle.dumps(pair))


def saved_whole(pair: tuple[nn.Module, FlatKFAC]) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_goes_on_bit_for_bit_and_on_its_own(duplicate: Any) -> None:
    model, optimizer = fresh()
    train(model, optimizer, 4, shape=SHAPE)
    other, copied = duplicate((model, optimizer))
    assert copied.model is other
    assert copied.param_groups is copied.base.param_groups
    before = snapshot(model, optimizer)
    train(other, copied, 5, start=4, shape=SHAPE)
    assert same(snapshot(model, optimizer), before)
    train(model, optimizer, 5, start=4, shape=SHAPE)
    assert same(snapshot(other, copied), snapshot(model, optimizer))


def test_a_copy_before_the_first_step_goes_on_alike_too() -> None:
    model, optimizer = fresh()
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, shape=SHAPE)
    train(other, copied, 3, shape=SHAPE)
    assert same(snapshot(other, copied), snapshot(model, optimizer))


def test_the_criterion_of_a_copy_is_its_own() -> None:
    model = mlp()
    criterion = nn.CrossEntropyLoss()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, fisher="empirical", criterion=criterion, every=1)
    train(model, optimizer, 2)
    other, copied, its_criterion = copy.deepcopy((model, optimizer, criterion))
    assert its_criterion is not criterion
    train(other, copied, 3, start=2)
    train(model, optimizer, 3, start=2)
    assert same(snapshot(other, copied), snapshot(model, optimizer))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copied_model_is_free_of_hooks_after_its_first_call(duplicate: Any) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3)
    copied = duplicate(model)
    assert torch.equal(copied(x), model(x))
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    assert all(not getattr(copied, table) for table in tables)
    assert all(getattr(model, table) for table in tables)
    optimizer.zero_grad()
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    assert optimizer.rho > 0


def test_a_copy_made_between_backward_and_step_says_that_it_has_not_seen_the_batch() -> None:
    """Which is not copied. Nothing has changed then, and the original takes its step."""
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(model(x), y).backward()
    other, copied = copy.deepcopy((model, optimizer))
    before = snapshot(other, copied)
    with pytest.raises(RuntimeError, match="no forward pass"):
        copied.step()
    assert same(snapshot(other, copied), before)
    optimizer.step()
    assert optimizer.rho > 0
    assert not same(gradients(model), gradients(other))
    train(other, copied, 1)
    assert copied.rho > 0
