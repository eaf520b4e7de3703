"""Mixed precision: autocast in either half precision, and the penalty under a GradScaler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import likelihood
from tests.optimizer.loops import criterion_of, gradients, norm, penalty, plain, same, times
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient


def test_grad_scaler_steps_as_without_one_and_skips_on_overflow() -> None:
    model, other = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaled = plain(model, base=SGD(model.parameters(), lr=0.1), mu=0.3)
    unscaled = plain(other, base=SGD(other.parameters(), lr=0.1), mu=0.3)
    for step in range(3):
        x, y = batch(8, 4, seed=step, dtype=torch.float32)
        scaled.zero_grad()
        scaler.scale(criterion_of(scaled)(model(x), y)).backward()
        scaler.step(scaled)
        scaler.update()
        unscaled.zero_grad()
        criterion_of(unscaled)(other(x), y).backward()
        unscaled.step()
    assert scaled.rho > 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(model.state_dict())
    scaled.zero_grad()
    scaler.scale(criterion_of(scaled)(model(x), y) * float("inf")).backward()
    scaler.step(scaled)
    scaler.update()
    assert same(model.state_dict(), before)
    assert scaler.get_scale() == 2.0**9
    assert scaled.skipped == 0  # the scaler has not called step() at all


def test_autocast_of_the_forward_pass_is_that_of_the_curvature() -> None:
    model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
    seen: list[torch.dtype] = []

    def likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), y, reduction="none")

    optimizer = plain(model, mu=0.3, fisher="sampled", likelihood=likelihood)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert set(seen) == {torch.bfloat16}
    rho, _ = rho_and_gradient(mlp(), cross_entropy_sum(y), x.double())
    assert optimizer.rho == pytest.approx(float(rho), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("dtype", "logit"), [(torch.bfloat16, -6.0), (torch.float16, -9.0)])
def test_small_probabilities_are_not_lost_in_half_precision(dtype: torch.dtype, logit: float) -> None:
    logits = torch.tensor([[0.0, logit]], dtype=dtype, requires_grad=True)
    (g,) = torch.autograd.grad(likelihood.bernoulli(logits, torch.Generator().manual_seed(0)).sum(), logits)
    p = logits.detach().double().sigmoid()
    assert torch.allclose(g.double().square(), p * (1 - p), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0**8, 2.0**12])
def test_the_penalty_does_not_depend_on_the_loss_scale(scale: float, dtype: torch.dtype) -> None:
    """In units of the unscaled loss, against the penalty without a scaler in the same precision."""
    added = []
    for factor in (None, scale):
        model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
        optimizer = plain(model, mu=0.3, reduction="sum")
        scaler = torch.amp.GradScaler("cpu", init_scale=factor or 1.0, enabled=factor is not None)
        with torch.autocast("cpu", dtype=dtype):
            loss = criterion_of(optimizer)(model(x), y)
        scaler.scale(loss).backward()
        own = [g / (factor or 1.0) for g in gradients(model)]
        seen: list[list[Tensor]] = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen, model=model: seen.append(gradients(model)))
        scaler.step(optimizer)
        scaler.update()
        added.append([s - o for s, o in zip(seen[0], own, strict=True)])
    _, gradient = rho_and_gradient(mlp(), cross_entropy_sum(y), x.double(), reduction="sum")
    assert_gradients_close(added[1], added[0], tolerance=0.01)
    assert_gradients_close([a.double() for a in added[1]], times(0.3, gradient), tolerance=0.1)


@pytest.mark.parametrize("unscaled", [False, True], ids=["scaler.step alone", "after scaler.unscale_"])
def test_a_step_that_the_scaler_skips_has_no_penalty_and_the_next_one_its_own(unscaled: bool) -> None:
    model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
    optimizer = plain(model, mu=0.3, reduction="sum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = copy.deepcopy(model.state_dict())
    for factor in (float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(criterion_of(optimizer)(model(x if factor == 1 else 5 * x), y) * factor).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        own = gradients(model) if unscaled else [g / scaler.get_scale() for g in gradients(model)]
        seen: list[list[Tensor]] = []
        handle = optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append(gradients(model)))
        scaler.step(optimizer)
        handle.remove()
        scaler.update()
        if factor != 1:
            assert seen == []
            assert same(model.state_dict(), before)
            assert math.isnan(optimizer.rho)  # nothing has been computed
    assert optimizer.skipped == 0
    rho, gradient = rho_and_gradient(mlp(), cross_entropy_sum(y), x.double(), reduction="sum")
    added = [(s - o).double() for s, o in zip(seen[0], own, strict=True)]
    assert_gradients_close(added, times(0.3, gradient), tolerance=1e-4)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_a_penalty_in_half_precision(dtype: torch.dtype) -> None:
    model, (x, y) = mlp(dtype=dtype), batch(8, 4, dtype=dtype)
    optimizer = plain(model, mu=0.3, reduction="sum")
    seen = penalty(model, optimizer, x, y)
    assert all(d.dtype == dtype for d in seen)
    _, gradient = rho_and_gradient(mlp(dtype=dtype).double(), cross_entropy_sum(y), x.double(), reduction="sum")
    assert_gradients_close([d.double() for d in seen], times(0.3, gradient), tolerance=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_mu_is_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    added = []
    for mu in (1e-6, 1.0):
        model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
        optimizer = plain(model, mu=mu, reduction="sum")
        with torch.autocast("cpu", dtype=dtype):
            criterion_of(optimizer)(model(x), y).backward()
        for p in model.parameters():
            p.grad.zero_()  # beside the loss's gradient the small one would be rounded
        optimizer.step()
        added.append([g / mu for g in gradients(model)])
    assert norm(added[1]) > 0
    assert_gradients_close(added[0], added[1], tolerance=0.01)


def test_gradients_clipped_after_unscaling_are_those_of_the_loss() -> None:
    """The order that torch's notes give: unscale, clip, step; the penalty comes on top, within its own bound."""
    model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
    optimizer = plain(model, mu=100.0, clip=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(criterion_of(optimizer)(model(x), y)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    own = gradients(model)
    scaler.step(optimizer)
    assert norm(own) == pytest.approx(0.01, rel=1e-3)
    added = norm([g - o for g, o in zip(gradients(model), own, strict=True)])
    assert added == pytest.approx(0.5 * float(norm(own)), rel=1e-3)
