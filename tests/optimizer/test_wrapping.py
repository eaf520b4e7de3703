from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, norm, plain, train
from tests.reference import batch, cross_entropy_sum, mlp, rho_and_gradient

# -------------------------------------------------------------------------------------------------- every optimizer


# -------------------------------------------------------------------------------------------------- one truth


def test_it_is_an_optimizer_and_shares_the_bases_groups_state_and_defaults() -> None:
    model = mlp()
    base = Adam(model.parameters(), lr=0.01)
    optimizer = FlatKFAC(base, model)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    train(model, optimizer, 2)
    assert len(optimizer.state) == 6
    saved = copy.deepcopy(base.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    base.load_state_dict(saved)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_repr_shows_the_groups() -> None:
    model = mlp()
    assert "lr: 0.125" in repr(FlatKFAC(SGD(model.parameters(), lr=0.125), model))


# -------------------------------------------------------------------------------------------------- schedulers


# -------------------------------------------------------------------------------------------------- scaler


# -------------------------------------------------------------------------------------------------- closures


# -------------------------------------------------------------------------------------------------- hooks


def test_step_hooks_see_the_penalty_and_run_once() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3)
    order: list[str] = []
    seen: list[list[Tensor]] = []

    def before(*_: Any) -> None:
        order.append("pre")
        seen.append(gradients(model))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    criterion_of(optimizer)(model(x), y).backward()
    own = gradients(model)
    optimizer.step()
    assert order == ["pre", "post"]
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    added = [s - o for s, o in zip(seen[0], own, strict=True)]
    assert norm(added) == pytest.approx(0.3 * float(norm(gradient)), rel=1e-6)


def test_a_removed_hook_is_gone() -> None:
    model = mlp()
    optimizer = plain(model, mu=0.3)
    calls: list[int] = []
    handle = optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 1)
    assert calls == [1]


# -------------------------------------------------------------------------------------------------- around the model


def test_a_compiled_or_parallel_wrapper_around_the_model_is_looked_through() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    wrapper = nn.DataParallel(model)  # without devices: calls the module itself
    optimizer = plain(wrapper, base=SGD(model.parameters(), lr=0.0), mu=0.3)
    criterion_of(optimizer)(wrapper(x), y).backward()
    optimizer.step()
    rho, _ = rho_and_gradient(model, cross_entropy_sum(y), x)
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert set(optimizer.radii()) == {"0", "2", "4"}


def test_two_optimizers_on_one_model_do_not_disturb_each_other() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    first = plain(model, base=SGD(model[:2].parameters(), lr=0.0), mu=0.3)
    second = plain(model, base=SGD(model[2:].parameters(), lr=0.0), mu=0.3)
    output = model(x)
    criterion_of(first)(output, y)
    criterion_of(second)(output, y).backward()
    first.step()
    second.step()
    assert first.rho == second.rho > 0
