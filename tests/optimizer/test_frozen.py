"""Layers that are frozen, wholly or in part."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from tests.optimizer.loops import (
    penalty,
    plain,
    times,
)
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_parameters_without_a_gradient_stay_without() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    model[4].requires_grad_(False)
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.1), mu=0.3)
    before = model[4].weight.clone()
    penalty(model, optimizer, x, y)
    assert model[4].weight.grad is None
    assert torch.equal(model[4].weight, before)


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_a_frozen_layer_has_no_block_and_gradients_flow_through_it(frozen: str) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    names = [name for name in ("0", "2", "4") if name != frozen]
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum", names=names)
    model.get_submodule(frozen).requires_grad_(False)
    optimizer = plain(model, mu=0.3, reduction="sum")
    kept = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.requires_grad]
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, kept))
    assert set(optimizer.radii()) == set(names)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_layer_frozen_in_part(part: str) -> None:
    """Without its weight it has no block; without its bias it has the one that it had."""
    model, (x, y) = mlp(), batch(8, 4)
    names = ["0", "4"] if part == "weight" else ["0", "2", "4"]
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum", names=names)
    getattr(model[2], part).requires_grad_(False)
    optimizer = plain(model, mu=0.3, reduction="sum")
    kept = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.requires_grad]
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, kept))
    assert set(optimizer.radii()) == set(names)


def test_only_the_head_is_trained_on_frozen_features() -> None:
    """Everything in front needs no gradient at all."""
    model, (x, y) = seeded(Residual), batch(6, 2, 5, 5)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, names=["head"])
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = plain(model, base=SGD(model.head.parameters(), lr=0.0), mu=0.3)
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient[-2:]))


def test_layers_may_be_frozen_and_freed_between_steps() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, reduction="sum")
    for frozen in (None, "2", None, "0"):
        if frozen is not None:
            model.get_submodule(frozen).requires_grad_(False)
        names = [name for name in ("0", "2", "4") if name != frozen]
        _, gradient = rho_and_gradient(mlp(), cross_entropy_sum(y), x, reduction="sum", names=names)
        kept = [g for g, p in zip(gradient, model.parameters(), strict=True) if p.requires_grad]
        assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, kept))
        model.requires_grad_(True)
