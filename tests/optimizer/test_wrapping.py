import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Adam, Optimizer, lr_scheduler

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, norm, penalty, plain, same, snapshot, train
from tests.reference import Residual, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def is_plain(kind: Any) -> bool:
    """Optimizers that step on dense gradients without a closure."""
    return (
        inspect.isclass(kind)
        and issubclass(kind, Optimizer)
        and kind.__name__ not in ("Optimizer", "SparseAdam", "LBFGS")
    )


OPTIMIZERS = sorted((kind for kind in vars(torch.optim).values() if is_plain(kind)), key=lambda kind: kind.__name__)


def parameters_for(kind: type[Optimizer], model: nn.Module) -> list[nn.Parameter]:
    """Muon takes matrices only."""
    return [p for p in model.parameters() if kind.__name__ != "Muon" or p.dim() == 2]


# -------------------------------------------------------------------------------------------------- every optimizer


def test_there_are_optimizers_to_try() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Rprop"} <= {kind.__name__ for kind in OPTIMIZERS}


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_steps_on_the_gradients_with_the_penalty(kind: type[Optimizer]) -> None:
    """The same optimizer bare, handed those gradients, makes bitwise the same steps."""
    model = mlp(dtype=torch.float32)
    twin = copy.deepcopy(model)
    base, bare = kind(parameters_for(kind, model), lr=0.01), kind(parameters_for(kind, twin), lr=0.01)
    optimizer = FlatKFAC(base, model, mu=0.5, every=2)
    seen: list[list[Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    for step in range(4):
        x, y = batch(8, 4, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own = gradients(model)
        optimizer.step()
        assert norm([s - o for s, o in zip(seen[step], own, strict=True)]) > 1e-4
        for p, g in zip(twin.parameters(), seen[step], strict=True):
            p.grad = g
        bare.step()
    assert same(model.state_dict(), twin.state_dict())
    assert same(base.state_dict(), bare.state_dict())


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_implementations_of_the_base_optimizer_agree(options: dict[str, bool]) -> None:
    model, other = mlp(), mlp()
    train(model, plain(model, base=Adam(model.parameters(), lr=0.01), mu=0.3), 3)
    train(other, plain(other, base=Adam(other.parameters(), lr=0.01, **options), mu=0.3), 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-10)


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


def test_a_learning_rate_set_on_the_wrapper_is_the_one_used() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 2)
    assert same(model.state_dict(), mlp().state_dict())


def test_add_param_group_reaches_the_base_and_takes_a_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    base = SGD(model[0].parameters(), lr=0.0)
    optimizer = plain(model, base=base, mu=0.3)
    assert [bool(d.any()) for d in penalty(model, optimizer, x, y)] == [True] * 2 + [False] * 4
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.0, 0.5]
    assert [bool(d.any()) for d in penalty(model, optimizer, x, y)] == [True] * 4 + [False] * 2


def test_zero_grad_in_its_forms() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    for clear in (
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(set_to_none=True),
        lambda: optimizer.zero_grad(True),
    ):
        F.cross_entropy(model(x), y).backward()
        clear()
        assert all(p.grad is None for p in model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_repr_shows_the_groups() -> None:
    model = mlp()
    assert "lr: 0.125" in repr(FlatKFAC(SGD(model.parameters(), lr=0.125), model))


# -------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_on_the_wrapper_set_the_learning_rates_they_set_on_the_base(name: str) -> None:
    def rates(wrap: bool) -> list[tuple[float, ...]]:
        model = mlp()
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer: Optimizer = FlatKFAC(base, model, mu=0.1) if wrap else base
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(6):
            train(model, optimizer, 1, start=step)
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append((base.param_groups[0]["lr"], base.param_groups[0]["momentum"]))
        return seen

    assert rates(True) == rates(False)
    assert len(set(rates(True))) > 1


def test_a_scheduler_does_not_keep_the_penalty_from_being_added() -> None:
    """Schedulers replace ``step`` on the instance."""
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.5)
    lr_scheduler.StepLR(optimizer, 1)
    added = norm(penalty(model, optimizer, x, y))
    assert added > 0
    assert added == pytest.approx(0.5 * float(norm(gradient)), rel=1e-6)


# -------------------------------------------------------------------------------------------------- scaler


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


# -------------------------------------------------------------------------------------------------- closures


def test_lbfgs_follows_the_penalised_gradient_through_its_closure() -> None:
    """Against LBFGS on gradients to which the reference's penalty is added by hand."""
    model, (x, y) = mlp(), batch(8, 4)
    twin = copy.deepcopy(model)
    optimizer = plain(model, base=LBFGS(model.parameters(), lr=0.2, max_iter=4), mu=0.3, reduction="sum")
    calls: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x), y)
        loss.backward()
        calls.append(loss.detach())
        return loss

    def by_hand() -> Tensor:
        bare.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        _, gradient = rho_and_gradient(twin, cross_entropy_sum(y), x, reduction="sum")
        for p, g in zip(twin.parameters(), gradient, strict=True):
            p.grad.add_(g, alpha=0.3)
        return loss

    bare = LBFGS(twin.parameters(), lr=0.2, max_iter=4)
    for _ in range(2):
        returned, expected = optimizer.step(closure), bare.step(by_hand)
        assert torch.isclose(returned, expected, rtol=1e-6)
    assert len(calls) > 4
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned() -> None:
    model, other, (x, y) = mlp(), mlp(), batch(8, 4)
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.1), mu=0.3)
    direct = plain(other, base=SGD(other.parameters(), lr=0.1), mu=0.3)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert calls == [True]
    assert torch.isclose(returned, F.cross_entropy(mlp()(x), y))
    penalty(other, direct, x, y)
    assert same(model.state_dict(), other.state_dict())
    assert direct.step.__name__ == "step"


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


class Named(nn.Module):
    """Takes keyword arguments, nested ones too, and a tensor that has no axis of examples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, *, inputs: dict[str, list[Tensor]], scale: Tensor) -> Tensor:
        return self.net(scale * inputs["x"][0])


def test_keyword_arguments_and_nested_inputs_are_repeated_and_cut() -> None:
    model, (x, y) = Named(), batch(8, 4)
    optimizer = plain(model, mu=0.3, batch_fraction=0.5)
    criterion_of(optimizer)(model(scale=torch.tensor(2.0), inputs={"x": [x]}), y).backward()
    optimizer.step()
    rho, _ = rho_and_gradient(model.net, cross_entropy_sum(y[:4]), 2 * x[:4])
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


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


def test_a_step_in_between_without_backward_is_the_bases() -> None:
    """After zero_grad the base optimizer has nothing to do, and neither has the penalty."""
    model = seeded(Residual)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.3, every=1)
    model.train()
    train(model, optimizer, 1, shape=(8, 2, 5, 5))
    optimizer.zero_grad()
    model(batch(8, 2, 5, 5)[0])
    before = snapshot(model, optimizer.base)
    optimizer.step()
    assert same(snapshot(model, optimizer.base), before)
