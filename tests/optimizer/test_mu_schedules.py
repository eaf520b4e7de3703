"""mu and rho_max as functions of the step."""

from __future__ import annotations

import torch

from tests.optimizer.loops import penalty, plain, times
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
        if step == 2:
            assert_gradients_close(seen, times(0.3, gradient))
        else:
            assert all(torch.equal(d, torch.zeros_like(d)) for d in seen)
