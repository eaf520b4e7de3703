"""Mixed precision: autocast in either half precision, and the penalty under a GradScaler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import likelihood
from tests.optimizer.loops import criterion_of, plain, same
from tests.reference import batch, cross_entropy_sum, mlp, rho_and_gradient


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
def test_labels_drawn_in_half_precision_follow_the_distribution(dtype: torch.dtype, logit: float) -> None:
    logits = torch.full([2_000_000, 1], logit, dtype=dtype, requires_grad=True)
    losses = likelihood.bernoulli(logits, torch.Generator().manual_seed(0))
    positive = (losses > -logit / 2).float().mean()  # the loss of a label 1 is about -logit, that of a 0 about nothing
    assert float(positive) == pytest.approx(float(torch.sigmoid(torch.tensor(logit))), rel=0.2)
