"""Groups of parameters: which of them take a penalty, and with which weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from tests.optimizer.loops import (
    criterion_of,
    penalty,
    plain,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient


def test_add_param_group_reaches_the_base_and_takes_a_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    base = SGD(model[0].parameters(), lr=0.0)
    optimizer = plain(model, base=base, mu=0.3)
    assert [bool(d.any()) for d in penalty(model, optimizer, x, y)] == [True] * 2 + [False] * 4
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.0, 0.5]
    assert [bool(d.any()) for d in penalty(model, optimizer, x, y)] == [True] * 4 + [False] * 2


def test_only_parameters_that_the_optimizer_steps_on_take_a_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    base = SGD(model[2].parameters(), lr=0.0)
    seen = penalty(model, plain(model, base=base, mu=0.3), x, y)
    of_second = slice(2, 4)
    assert_gradients_close(seen[of_second], times(0.3, gradient[of_second]))
    assert all(not d.any() for d in seen[:2] + seen[4:])


def test_mask_terms_of_layers_that_the_optimizer_does_not_step_on_have_the_weight_of_all() -> None:
    """Their inputs are what other layers give out, whose channels may go."""
    x, y = batch(8, 4)
    terms = []
    for part in (slice(None), slice(2)):
        model = mlp()
        optimizer = plain(model, base=SGD(model[part].parameters(), lr=0.0), mu=0.3, reduction="sum")
        penalty(model, optimizer, x, y)
        terms.append([optimizer.input_mask_gradients()[model[i].weight] for i in (0, 2, 4)])
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*terms, strict=True))


def test_groups_keep_their_own_learning_rate_and_decay() -> None:
    """Against the bare optimizer on gradients to which the reference's penalty has been added."""

    def groups(model: nn.Sequential) -> SGD:
        first = {"params": list(model[:2].parameters()), "lr": 0.1, "weight_decay": 0.01}
        return SGD([first, {"params": list(model[2:].parameters()), "lr": 0.01, "momentum": 0.5}], lr=1.0)

    model, other = mlp(), mlp()
    optimizer, bare = plain(model, base=groups(model), mu=0.3, reduction="sum"), groups(other)
    for number in range(3):
        x, y = batch(8, 4, seed=number)
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
        bare.zero_grad()
        _, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, reduction="sum")
        F.cross_entropy(other(x), y).backward()
        for p, g in zip(other.parameters(), gradient, strict=True):
            p.grad.add_(g, alpha=0.3)
        bare.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-12)


def test_a_group_added_in_the_middle_of_training_takes_a_penalty_from_the_next_refresh_on() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, base=SGD(model[:4].parameters(), lr=0.0), mu=0.3, every=2)
    penalty(model, optimizer, x, y)
    optimizer.add_param_group({"params": list(model[4].parameters())})
    assert not any(d.any() for d in penalty(model, optimizer, x, y)[4:])
    assert all(d.any() for d in penalty(model, optimizer, x, y)[4:])
