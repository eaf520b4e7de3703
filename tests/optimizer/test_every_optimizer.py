"""Every optimizer of torch.optim can be the base, LBFGS with its closure as well."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Adam, Optimizer, SparseAdam

from kfac_flat import FlatKFAC
from tests.optimizer.loops import criterion_of, gradients, norm, penalty, plain, same, train
from tests.reference import batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


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
        assert (norm([s - o for s, o in zip(seen[step], own, strict=True)]) > 1e-4) == (step % 2 == 0)
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


class Plain(Optimizer):
    """As somebody may write one: its step does without gradients, and leaves that to the closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p -= 0.1 * p.grad
        return loss


def test_a_closure_has_gradients_whatever_the_base_does() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = FlatKFAC(Plain(model.parameters()), model, mu=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert optimizer.rho > 0


def test_sparse_gradients_are_left_to_the_optimizer_that_takes_them() -> None:
    """SparseAdam steps on gradients to which nothing dense can be added; the dense layers are another one's."""
    model = seeded(
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    )
    twin = copy.deepcopy(model)
    tokens, y = torch.arange(40).view(8, 5) % 9, torch.arange(8) % 3
    optimizer = FlatKFAC(SparseAdam(list(model[0].parameters()), lr=0.1), model, mu=0.5, every=1)
    bare = SparseAdam(list(twin[0].parameters()), lr=0.1)
    for _ in range(3):
        for net, steps in ((model, optimizer), (twin, bare)):
            steps.zero_grad()
            F.cross_entropy(net(tokens), y).backward()
            steps.step()
    assert same(model.state_dict(), twin.state_dict())


def test_lbfgs_minimises_the_penalised_objective() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    base = LBFGS(model.parameters(), lr=0.1, max_iter=4)
    optimizer = plain(model, base=base, mu=0.05, reduction="sum")
    criterion = criterion_of(optimizer)

    def objective() -> float:
        rho, _ = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
        return float(criterion(model(x), y).detach() + 0.05 * rho)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    before = objective()
    for _ in range(3):
        optimizer.step(closure)
    assert objective() < before


def test_lbfgs_is_refused_where_some_of_its_evaluations_would_lack_the_penalty() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"LBFGS compares the gradients .* every=8 .* give FlatKFAC every=1"):
        FlatKFAC(LBFGS(model.parameters()), model)
    with pytest.raises(ValueError, match="give FlatKFAC every=1"):
        FlatKFAC(LBFGS([{"params": list(model.parameters()), "mu": 0.1}]), model, mu=0.0)
    FlatKFAC(LBFGS(model.parameters()), model, mu=0.0)
    FlatKFAC(LBFGS(model.parameters()), model, every=1)
