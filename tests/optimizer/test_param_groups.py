"""Groups of parameters: which of them take a penalty, and with which weight."""

from __future__ import annotations

from torch.optim import SGD

from tests.optimizer.loops import penalty, plain, times
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
