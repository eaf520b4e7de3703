"""Bounds on gradients: that on the penalty, and those that a training loop sets itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, norm, penalty, plain, small_net, step, times, train
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient


@pytest.mark.parametrize("clip", [0.5, 1e-3])
def test_clip_bounds_the_penalty_relative_to_the_loss_gradient_and_keeps_its_direction(clip: float) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    F.cross_entropy(model(x), y).backward()
    bound = clip * norm(gradients(model))
    assert 100 * norm(gradient) > bound
    seen = penalty(model, plain(model, mu=100.0, clip=clip), x, y)
    assert torch.isclose(norm(seen), bound, rtol=1e-9)
    assert_gradients_close(seen, times(float(bound / norm(gradient)), gradient), tolerance=1e-8)


def test_clip_leaves_a_small_penalty_alone() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    seen = penalty(model, plain(model, mu=1e-3, clip=1.0), x, y)
    assert_gradients_close(seen, times(1e-3, gradient), tolerance=1e-7)


@pytest.mark.parametrize("clip", [None, 1e6])
def test_a_refresh_adds_the_penalty_of_all_steps_until_the_next_where_the_bound_is_out_of_reach(clip: Any) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=1e-3, every=4, clip=clip)
    for number in range(9):
        seen = penalty(model, optimizer, x, y)
        if number % 4:
            assert norm(seen) == 0
        else:
            assert_gradients_close(seen, times(4e-3, gradient), tolerance=1e-7)


def test_the_bound_holds_where_half_precision_cannot_hold_the_norms() -> None:
    model, (x, y) = mlp(dtype=torch.float16), batch(8, 4, dtype=torch.float16)
    optimizer = plain(model, mu=1e4, clip=0.01)
    criterion_of(optimizer)(model(x), y).backward()
    for p in model.parameters():
        p.grad.fill_(30000.0)
    own = gradients(model)
    assert norm(own) == float("inf")
    optimizer.step()
    assert optimizer.skipped == 0
    added = norm([(g - o).float() for g, o in zip(gradients(model), own, strict=True)])
    assert added == pytest.approx(0.01 * float(norm([o.float() for o in own])), rel=0.05)


def test_the_bound_is_on_all_that_a_refresh_adds_for_the_steps_to_come() -> None:
    model = small_net()
    base = SGD(model.parameters(), lr=0.0)
    optimizer = FlatKFAC(base, model, mu=100.0, every=4, clip=0.5)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    for i in range(8):
        x = torch.randn(12, 4)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(12) % 3).backward()
        loss_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        added = (seen[-1] - loss_gradient).norm()
        if i % 4:
            assert added == 0
        else:  # all parameters that rho depends on count, which may not be all there are
            assert 0.2 * loss_gradient.norm() < added <= 0.5 * loss_gradient.norm() * (1 + 1e-4)


def test_a_mask_term_follows_the_bound_and_a_mu_of_zero_clears_it() -> None:
    terms = []
    for clip in (None, 1e-3):
        model = small_net()
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=lambda s: 5.0 if s == 0 else 0.0, clip=clip)
        torch.manual_seed(1)
        step(model, optimizer)
        terms.append(optimizer.input_mask_gradients())
        step(model, optimizer)
        assert optimizer.input_mask_gradients() == {}
    unbounded, bounded = (torch.cat(list(of_weights.values())).norm() for of_weights in terms)
    assert 0 < bounded < 0.1 * unbounded


@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradients_that_the_loop_clips_are_the_losss_alone(how: str) -> None:
    """Clipping comes before step(), so the penalty is added to what it has left; hooks see the sum."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(model(x), y).backward()
    if how == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    else:
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
    own = gradients(model)
    optimizer.step()
    assert_gradients_close([g - o for g, o in zip(gradients(model), own, strict=True)], times(0.3, gradient))


def test_a_hook_before_the_bases_step_can_clip_the_sum() -> None:
    model = mlp()
    base = SGD(model.parameters(), lr=1.0)
    optimizer = plain(model, base=base, mu=3.0)
    optimizer.register_step_pre_hook(lambda *_: [nn.utils.clip_grad_norm_(model.parameters(), 0.1)].clear())
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1)
    moved = norm([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert moved == pytest.approx(0.1, rel=1e-4)
