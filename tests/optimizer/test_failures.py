"""What fails or is not finite never costs the step of the wrapped optimizer, nor anything silently."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

from kfac_flat import FlatKFAC
from kfac_flat.curvature import tracker
from tests import reference
from tests.optimizer.loops import criterion_of, norm, penalty, plain, same, small_net, snapshot, step, times, train
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_an_interrupt_in_the_first_refresh_leaves_an_optimizer_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_net()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    calls: list[int] = []
    whole = tracker.factors_times

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tracker, "factors_times", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(model, optimizer)
    for _ in range(5):
        step(model, optimizer)
    assert optimizer.rho > 0


class Distances(nn.Module):
    """Its first layer lies behind an operation that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 3)
        self.centres = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cdist(100 * self.a(x), self.centres))


def test_a_layer_behind_an_operation_without_second_derivative_is_left_out_by_name() -> None:
    torch.manual_seed(0)
    model = Distances()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=1e-6), model, every=1, layers=["a", "b"])
    with torch.no_grad():
        model.b.weight.mul_(10)
    for _ in range(3):
        step(model, optimizer, 0.01 * torch.randn(12, 4))
    assert "no second derivative" in optimizer.skipped_layers.get("a", "") or set(optimizer.radii()) == {"a", "b"}
    assert torch.isfinite(model.a.weight).all()


def spoiled(kind: str, x: Tensor, y: Tensor, model: nn.Module) -> Tensor:
    """A loss that is not finite, or whose gradients are not."""
    if kind == "input":
        return F.cross_entropy(model(x * float("nan")), y)
    if kind == "loss":
        return F.cross_entropy(model(x), y) * float("inf")
    output = model(x)
    return (output * 0).sum().sqrt() + output.sum()  # a finite value, whose derivative is inf * 0


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("eigenpairs", ["streaming", "exact"])
def test_not_finite_steps_are_the_bases_own_and_counted_with_one_warning(
    kind: str, likelihood: str, eigenpairs: str
) -> None:
    model = mlp(dtype=torch.float32)
    optimizer = FlatKFAC(
        Adam(model.parameters(), lr=0.01), model, mu=0.5, every=1, likelihood=likelihood, eigenpairs=eigenpairs
    )
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    bare = Adam(twin.parameters(), lr=0.01)
    bare.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    x, y = batch(8, 4, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 4):
            for m, o in ((model, optimizer), (twin, bare)):
                o.zero_grad()
                spoiled(kind, x, y, m).backward()
                o.step()
            assert optimizer.skipped == step
            assert same(snapshot(model, optimizer.base), snapshot(twin, bare))
    (warning,) = caught
    assert warning.category is UserWarning
    assert "FlatKFAC.skipped" in str(warning.message)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e200])
def test_a_penalty_that_is_not_finite_beside_a_loss_that_is_costs_nothing_but_itself(factor: float, clip: Any) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(
        model, mu=0.3, clip=clip, fisher="sampled", likelihood=lambda output, _: factor * output.square().sum(1)
    )
    with pytest.warns(UserWarning, match="left the penalty out"):
        added = penalty(model, optimizer, x, y)
    assert all(torch.equal(d, torch.zeros_like(d)) for d in added)
    assert optimizer.skipped == 1
    assert not any(term.any() for term in optimizer.input_mask_gradients().values())


def test_finite_steps_are_not_counted() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.5, every=1)
    train(model, optimizer, 3)
    assert optimizer.skipped == 0


@pytest.mark.parametrize("eigenpairs", ["streaming", "exact"])
@pytest.mark.parametrize("first", [True, False])
def test_the_penalty_returns_with_the_first_finite_batch(eigenpairs: str, first: bool) -> None:
    """A bad batch that the user keeps from the weights (lr = 0) leaves no trace in the curvature."""
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.5, every=1, eigenpairs=eigenpairs, clip=None)
    if not first:
        train(model, optimizer, 1)
    weights = copy.deepcopy(model.state_dict())
    x, y = batch(8, 4)
    F.cross_entropy(model(x * float("nan")), y).backward()
    with pytest.warns(UserWarning, match="left the penalty out"):
        optimizer.step()
    model.load_state_dict(weights)  # 0 * NaN
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    own = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert optimizer.skipped == 1
    assert 0 < optimizer.rho < float("inf")
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any((p.grad != o).any() for p, o in zip(model.parameters(), own, strict=True))


def test_a_bad_refresh_adds_nothing_until_the_next_one() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.5, every=3)
    x, y = batch(8, 4)
    weights = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(x * float("nan")), y).backward()
    with pytest.warns(UserWarning, match="left the penalty out"):
        optimizer.step()
    assert not any(term.any() for term in optimizer.input_mask_gradients().values())
    model.load_state_dict(weights)
    for number in (1, 2, 3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        unchanged = all(torch.equal(p.grad, o) for p, o in zip(model.parameters(), own, strict=True))
        assert unchanged == (number < 3)


# -------------------------------------------------------------------------------------------------- second derivatives


class Once(torch.autograd.Function):
    """The identity, with a derivative that has none itself, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Fused(nn.Module):
    def __init__(self, once: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.head, self.once = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3), once

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(Once.apply(x) if self.once else x))


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_layers_behind_which_something_is_differentiable_once_are_named_and_the_others_are_right(
    reduction: str,
) -> None:
    """torch itself would take their curvature for a constant without a word."""
    model, other = seeded(Fused), seeded(lambda: Fused(once=False))
    x, y = batch(8, 4)
    for net in (model, other):
        net.first.weight.data.mul_(9)  # so that the maximum is in front
    values = reference.radii(other, cross_entropy_sum(y), x)
    assert max(values, key=lambda name: values[name].item()) != "head"
    optimizer = plain(model, mu=0.3, reduction=reduction)
    for _ in range(3):  # with reduction="max" the other one may be at the maximum once the first one is gone
        seen = penalty(model, optimizer, x, y)
    skipped = optimizer.skipped_layers
    assert skipped.keys() == ({"first", "second"} if reduction == "sum" else {"second"})
    assert all("once_differentiable" in reason for reason in skipped.values())
    names = [name for name in values if name not in skipped]
    _, gradient = rho_and_gradient(other, cross_entropy_sum(y), x, names=names, reduction=reduction)
    assert_gradients_close(seen, times(0.3, gradient))


@pytest.mark.parametrize("kind", [Fused, Distances])
def test_the_step_that_finds_a_layer_without_second_derivative_has_the_penalty_of_the_others(kind: Any) -> None:
    model, (x, y) = seeded(kind), batch(8, 4)
    optimizer = plain(model, mu=0.3, reduction="sum")
    found, again = (penalty(model, optimizer, x, y) for _ in range(2))
    assert optimizer.skipped_layers
    assert any(gradient.any() for gradient in found)
    assert_gradients_close(found, again)


def test_where_no_layer_is_left_the_error_names_them_all() -> None:
    model = seeded(Fused)
    optimizer = plain(model, mu=0.3, reduction="sum", layers=["first", "second"])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"none left.*first is followed by something .*; second is"):
        penalty(model, optimizer, *batch(8, 4))
    assert same(model.state_dict(), before)


# -------------------------------------------------------------------------------------------------- out of memory


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("first", [True, False])
def test_out_of_memory_costs_the_penalty_and_not_the_step(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    model, other = mlp(), mlp()
    base = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = FlatKFAC(base, model, mu=0.3, every=2, batch_fraction=0.5)
    if not first:
        train(model, optimizer, 2)
    other.load_state_dict(model.state_dict())
    bare = SGD(other.parameters(), lr=0.1, momentum=0.9)
    bare.load_state_dict(copy.deepcopy(base.state_dict()))
    tries: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "factors_times", lambda *_: (tries.append(1), out_of_memory()))
        with pytest.warns(UserWarning, match="curvature of 4 of 8 .*batch_fraction, such as 0.25"):
            train(model, optimizer, 1, start=2)
        assert len(tries) == 1, "the whole batch needs more"
        assert optimizer._calls.graphs == []
        train(model, optimizer, 1, start=3)  # the step until the next refresh has no penalty, and no warning
    train(other, bare, 2, start=2)
    assert same(snapshot(model, base), snapshot(other, bare))
    train(model, optimizer, 1, start=4)
    train(other, bare, 1, start=4)
    assert not same(model.state_dict(), other.state_dict())
    assert optimizer.rho > 0


def test_out_of_memory_for_the_comparison_of_outputs_costs_one_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.3, every=2)
    with monkeypatch.context() as patch:
        patch.setattr(tracker.RadiusTracker, "output", out_of_memory)
        with pytest.warns(UserWarning, match="out of memory"):
            added = penalty(model, optimizer, *batch(8, 4))
        assert norm(added) == 0
        train(model, optimizer, 1, start=1)
    assert norm(penalty(model, optimizer, *batch(8, 4))) > 0


def test_out_of_memory_in_the_users_own_pass_is_the_users() -> None:
    model = mlp()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=0.3)
    model[2].register_forward_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(batch(8, 4)[0])
    model[2]._forward_hooks.clear()
    train(model, optimizer, 1)
    assert optimizer.rho > 0


def hooked(model: nn.Module, layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


def noisy(model: nn.Module, layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    layer.register_forward_hook(lambda module, inputs, output: output + torch.randn(output.shape, generator=generator))


@pytest.mark.parametrize("change", [hooked, noisy])
def test_outputs_that_the_twin_cannot_repeat_are_noticed_at_the_first_refresh(change: Any) -> None:
    model = small_net()
    change(model, model[0])
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=2)
    with pytest.warns(UserWarning, match=r"gives another output than the model did \(the difference is \d+%"):
        step(model, optimizer)
    for _ in range(4):  # said once
        step(model, optimizer)


class Louder(nn.Module):
    """What it gives depends on an attribute, and on dropout in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop, self.factor = mlp(), nn.Dropout(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.drop(self.net(x))


def test_outputs_of_other_settings_than_those_of_the_step_are_not_compared() -> None:
    for change in ("looked at louder", "evaluated since"):
        model, (x, y) = Louder(), batch(8, 4)
        optimizer = plain(model, mu=0.3)
        model.factor = 3.0 if change == "looked at louder" else 1.0
        looked_at = model(x)
        model.factor = 1.0
        criterion_of(optimizer)(model(x), y).backward()
        model.train(change != "evaluated since")
        optimizer.step()
        assert looked_at.requires_grad
        assert optimizer.rho > 0


class Forces(nn.Module):
    """Differentiates in its forward pass, which takes gradients to be on."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        energy = (self.stiffness * at.square()).square().sum()
        (force,) = torch.autograd.grad(energy, at, create_graph=True)
        return self.head(force)


class Quieter(nn.Module):
    """Computes something else where nobody asks for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output if torch.is_grad_enabled() else 0.5 * output


class Padded(nn.Module):
    """torch's encoder, which takes other ways in eval mode without gradients, and warns of them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        sequences = x.unsqueeze(1).expand(-1, 5, -1)
        padding = (torch.arange(5) > 2).expand(len(x), -1)
        return self.head(self.encoder(sequences, src_key_padding_mask=padding)[:, 0])


@pytest.mark.parametrize("kind", [Forces, Quieter, lambda: Padded().eval()])
def test_models_that_do_otherwise_without_gradients_are_compared_as_they_train(kind: Any) -> None:
    model = seeded(kind)
    optimizer = plain(model, mu=0.3)
    assert any(gradient.any() for gradient in penalty(model, optimizer, *batch(8, 4)))


def test_hooks_that_only_look_are_no_reason_to_warn() -> None:
    model, seen = small_net(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=2)
    for _ in range(3):
        step(model, optimizer)
    assert len(seen) == 3
    assert all(graph.output is None for graph in optimizer._calls.graphs)
