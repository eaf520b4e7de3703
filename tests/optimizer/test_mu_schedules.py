"""mu and rho_max as functions of the step, and by group of parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, norm, penalty, plain, same, times, train
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient


def test_mu_and_rho_max_may_be_functions_of_the_step() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    schedule = [0.1, 0.0, 0.2, 0.4]
    optimizer = plain(model, mu=lambda step: schedule[step], rho_max=lambda step: 0.0 if step < 3 else 2 * float(rho))
    for mu in (0.1, 0.0, 0.2, 0.0):  # the last one: below the threshold
        seen = penalty(model, optimizer, x, y)
        if mu:
            assert_gradients_close(seen, times(mu, gradient))
        else:
            assert all(torch.equal(d, torch.zeros_like(d)) for d in seen)


def test_a_mu_that_returns_from_zero_refreshes_at_once() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=lambda step: 0.3 if step == 2 else 0.0, every=5)
    for step in range(4):
        seen = penalty(model, optimizer, x, y)
        if step == 2:  # for this step and the two until the next that would compute it anyway
            assert_gradients_close(seen, times(3 * 0.3, gradient))
        else:
            assert all(torch.equal(d, torch.zeros_like(d)) for d in seen)


def test_a_mu_that_comes_and_goes_between_refreshes_adds_nothing_twice() -> None:
    """What the first step has added stands for all until the next refresh."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=lambda step: 0.3 * (step % 2 == 0), every=4)
    for step in range(9):
        seen = penalty(model, optimizer, x, y)
        if step % 4:
            assert norm(seen) == 0
        else:
            assert_gradients_close(seen, times(4 * 0.3, gradient))


def test_steps_without_gradients_put_a_refresh_off_to_the_first_with_some() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3, every=4)
    model(x)
    optimizer.step()
    for step in (1, 2, 3):
        seen = penalty(model, optimizer, x, y)
        if step == 1:
            assert_gradients_close(seen, times(3 * 0.3, gradient))
        else:
            assert norm(seen) == 0


# -------------------------------------------------------------------------------------------------- by group


def grouped(**second: Any) -> tuple[nn.Sequential, FlatKFAC]:
    """The first two layers in one group, the last one in another with settings of its own."""
    model = mlp()
    base = SGD([{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters()), **second}], lr=0.0)
    return model, plain(model, base=base, mu=0.3, reduction="sum")


def test_a_group_may_have_its_own_mu_and_rho_max() -> None:
    """Each group descends the objective that its own settings define."""
    x, y = batch(8, 4)
    rho, gradient = rho_and_gradient(mlp(), cross_entropy_sum(y), x, reduction="sum")
    for own, factor in (
        ({}, 0.3),
        ({"mu": 0.05}, 0.05),
        ({"rho_max": 2 * float(rho)}, 0.0),
        ({"mu": 0.7, "rho_max": 0.5 * float(rho)}, 0.7),
        ({"mu": lambda step: 0.1 * (step + 1)}, 0.1),
    ):
        model, optimizer = grouped(**own)
        seen = penalty(model, optimizer, x, y)
        assert_gradients_close(seen, times(0.3, gradient[:4]) + times(factor, gradient[4:]))


def test_a_group_whose_mu_is_zero_steps_as_the_base_does_bit_for_bit() -> None:
    model, optimizer = grouped(mu=0.0)
    x, y = batch(8, 4)
    criterion_of(optimizer)(model(x), y).backward()
    own = gradients(model)
    optimizer.step()
    assert same(gradients(model)[4:], own[4:])
    assert not same(gradients(model)[:4], own[:4])


def test_the_bound_is_relative_to_the_gradients_that_take_a_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    base = SGD([{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters()), "mu": 0.0}], lr=0.0)
    optimizer = plain(model, base=base, mu=100.0, clip=0.5)
    F.cross_entropy(model(x), y).backward()
    bound = 0.5 * norm(gradients(model)[:4])
    optimizer.zero_grad()
    assert torch.isclose(norm(penalty(model, optimizer, x, y)), bound, rtol=1e-9)


def test_a_penalty_of_one_group_alone() -> None:
    x, y = batch(8, 4)
    _, gradient = rho_and_gradient(mlp(), cross_entropy_sum(y), x)
    model = mlp()
    base = SGD([{"params": list(model[:4].parameters())}, {"params": list(model[4].parameters()), "mu": 0.2}], lr=0.0)
    optimizer = plain(model, base=base, mu=0.0)
    seen = penalty(model, optimizer, x, y)
    assert_gradients_close(seen[4:], times(0.2, gradient[4:]))
    assert all(torch.equal(d, torch.zeros_like(d)) for d in seen[:4])


def test_a_groups_mu_can_be_changed_while_training_and_is_saved() -> None:
    model, optimizer = grouped(mu=0.1)
    x, y = batch(8, 4)
    first = penalty(model, optimizer, x, y)
    optimizer.param_groups[1]["mu"] = 0.2
    second = penalty(model, optimizer, x, y)
    assert_gradients_close(second[4:], times(2.0, first[4:]))
    _, other = grouped(mu=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[1]["mu"] == 0.2


def test_mask_terms_have_the_weight_of_their_layers_group() -> None:
    x, y = batch(8, 4)
    terms = []
    for own in ({}, {"mu": 0.6}):
        model, optimizer = grouped(**own)
        penalty(model, optimizer, x, y)
        terms.append([optimizer.input_mask_gradients()[model[i].weight] for i in (0, 2, 4)])
    assert all(torch.allclose(a, b) for a, b in zip(terms[0][:2], terms[1][:2], strict=True))
    assert torch.allclose(2 * terms[0][2], terms[1][2])


@pytest.mark.parametrize(
    ("own", "message"),
    [({"mu": -1.0}, "mu is -1.0"), ({"rho_max": "high"}, "rho_max is 'high'"), ({"mu": None}, "mu is None")],
)
def test_a_groups_setting_out_of_range_is_refused_and_nothing_changes(own: dict[str, Any], message: str) -> None:
    model, optimizer = grouped(**own)
    x, y = batch(8, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        penalty(model, optimizer, x, y)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["mu", "rho_max"])
def test_schedules_are_asked_for_the_number_of_the_step(name: str) -> None:
    """Which counts the wrapper's steps and goes on from a checkpoint."""
    asked: list[int] = []

    def schedule(step: int) -> float:
        asked.append(step)
        return 0.1

    model = mlp()
    optimizer = plain(model, **{name: schedule})
    train(model, optimizer, 3)
    assert sorted(set(asked)) == [0, 1, 2]
    resumed = plain(mlp(), **{name: schedule})
    resumed.load_state_dict(optimizer.state_dict())
    asked.clear()
    train(resumed.model, resumed, 1, start=3)
    assert set(asked) == {3}
