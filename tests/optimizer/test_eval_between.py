"""Looking at the model between steps changes nothing."""

from __future__ import annotations

import torch

from tests.optimizer.loops import criterion_of, gradients, plain, times
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, rho_and_gradient, seeded


def test_looking_at_validation_data_between_forward_and_step_changes_nothing() -> None:
    model, (x, y) = seeded(Residual), batch(8, 2, 5, 5)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    other, _ = batch(8, 2, 5, 5, seed=9)
    optimizer = plain(model, mu=0.3)
    criterion_of(optimizer)(model(x), y).backward()
    own = gradients(model)
    model.eval()
    model(other)
    with torch.no_grad():
        model(other)
    model.train()
    with torch.no_grad():
        model(other)
    optimizer.step()
    added = [g - o for g, o in zip(gradients(model), own, strict=True)]
    assert_gradients_close(added, times(0.3, gradient))
