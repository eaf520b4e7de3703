"""SAM against loops that do by hand what the paper says, on all that breaks wrappers of its kind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Adam, lr_scheduler

from baselines import SAM
from kfac_flat import FlatKFAC, NeuronPruner
from tests.optimizer.loops import same, snapshot
from tests.reference import Residual, batch, mlp, seeded

SHAPES = {"mlp": (8, 4), "dropout": (8, 4), "residual": (8, 2, 5, 5)}


def network(kind: str = "mlp") -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": mlp,
        "dropout": lambda: seeded(lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.4), nn.ReLU(), nn.Linear(9, 3))),
        "residual": lambda: seeded(lambda: Residual(inplace=True)),
    }
    return makers[kind]()


def wrapped(model: nn.Module, momentum: float = 0.9, **options: Any) -> tuple[SAM, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    return SAM(SGD(model.parameters(), lr=0.1, momentum=momentum), model, criterion, **options), criterion


def train(model: nn.Module, optimizer: Any, criterion: nn.Module, shape: Sequence[int], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x, y = batch(*shape, seed=step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()


def by_hand(model: nn.Module, base: Any, parts: Sequence[Callable[[nn.Module], Tensor]], rho: float) -> None:
    """One step of the paper's algorithm; statistics of normalisation are what the first pass left."""
    random = torch.get_rng_state()
    base.zero_grad()
    for loss in parts:
        loss(model).backward()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    squares = 0.0
    for p in model.parameters():
        squares += float((p.grad**2).sum())
    there = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(model.parameters(), there.parameters(), strict=True):
            q += rho * p.grad / squares**0.5
    torch.set_rng_state(random)
    there.zero_grad()
    for loss in parts:
        loss(there).backward()
    for p, q in zip(model.parameters(), there.parameters(), strict=True):
        p.grad = q.grad
    base.step()
    assert same(dict(model.named_buffers()), statistics)


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for (name, s), t in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.allclose(s, t, rtol=1e-10, atol=1e-12), name


# -------------------------------------------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("kind", SHAPES)
def test_an_unchanged_loop_does_what_the_paper_says(kind: str) -> None:
    """Running statistics and dropout masks included."""
    model, other = network(kind), network(kind)
    optimizer, criterion = wrapped(model, rho=0.3)
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, criterion, SHAPES[kind], range(4))
    for step in range(4):
        torch.manual_seed(step)
        x, y = batch(*SHAPES[kind], seed=step)
        by_hand(other, base, [lambda m, x=x, y=y: F.cross_entropy(m(x), y)], rho=0.3)
    assert_close(model, other)
    assert optimizer.skipped == 0


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rho=st.floats(0.01, 3.0))
def test_on_a_quadratic_the_gradient_is_known_in_closed_form(seed: int, rho: float) -> None:
    """For 1/2 sum (X w - y)^2, g = X^T (X w - y) and the gradient at w + e is g + X^T X e."""
    (x, _), (y, _) = batch(6, 3, seed=seed), batch(6, 1, seed=seed + 1)
    model = nn.Linear(3, 1, bias=False).double()
    w = model.weight.detach().flatten().clone()
    criterion = nn.MSELoss(reduction="sum")
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, criterion, rho=rho)
    (0.5 * criterion(model(x), y)).backward()
    optimizer.step()
    hessian, residual = torch.zeros(3, 3).double(), torch.zeros(6).double()
    for n in range(6):
        hessian += torch.outer(x[n], x[n])
        residual[n] = x[n].dot(w) - y[n, 0]
    g = sum(residual[n] * x[n] for n in range(6))
    expected = w - 0.1 * (g + hessian @ (rho * g / g.norm()))
    assert torch.allclose(model.weight.flatten(), expected, rtol=1e-9, atol=1e-9)


def test_without_a_distance_it_is_the_wrapped_optimizer_bit_for_bit() -> None:
    model, other = network("residual"), network("residual")
    optimizer, criterion = wrapped(model, rho=0.0)
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, criterion, SHAPES["residual"], range(4))
    train(other, base, nn.CrossEntropyLoss(), SHAPES["residual"], range(4))
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_dict()["state"], base.state_dict()["state"])


def test_the_distance_can_follow_the_steps() -> None:
    model, other = network(), network()
    optimizer, criterion = wrapped(model, rho=lambda step: 0.2 * (step % 2))
    train(model, optimizer, criterion, (8, 4), range(4))
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        x, y = batch(8, 4, seed=step)
        by_hand(other, base, [lambda m, x=x, y=y: F.cross_entropy(m(x), y)], rho=0.2 * (step % 2))
    assert_close(model, other)


def test_the_random_generator_goes_on_as_without_it() -> None:
    model = network("dropout")
    train(model, *wrapped(model), SHAPES["dropout"], range(1))
    after = torch.get_rng_state()
    other = network("dropout")
    train(other, SGD(other.parameters(), lr=0.1), nn.CrossEntropyLoss(), SHAPES["dropout"], range(1))
    assert torch.equal(after, torch.get_rng_state())


# -------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_batches_are_all_repeated_with_their_weights(kind: str, set_to_none: bool) -> None:
    model, other = network(kind), network(kind)
    optimizer, criterion = wrapped(model, rho=0.3)
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        batches = [batch(*SHAPES[kind], seed=10 * step + i) for i in range(2)]
        weights = [0.25, 1.5]
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none)
        for weight, (x, y) in zip(weights, batches, strict=True):
            (weight * criterion(model(x), y)).backward()
        optimizer.step()
        torch.manual_seed(step)
        parts = [
            lambda m, w=w, x=x, y=y: w * F.cross_entropy(m(x), y) for w, (x, y) in zip(weights, batches, strict=True)
        ]
        by_hand(other, base, parts, rho=0.3)
    assert_close(model, other)


def test_losses_that_are_reduced_outside_the_criterion_are_repeated_too() -> None:
    model, other, (x, y) = network(), network(), batch(8, 4)
    criterion, importance = nn.CrossEntropyLoss(reduction="none"), torch.linspace(0, 2, 8).double()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, criterion, rho=0.3)
    (criterion(model(x), y) * importance).mean().backward()
    optimizer.step()
    loss = lambda m: (F.cross_entropy(m(x), y, reduction="none") * importance).mean()  # noqa: E731
    by_hand(other, SGD(other.parameters(), lr=0.1), [loss], rho=0.3)
    assert_close(model, other)


def test_two_losses_of_one_output_are_repeated_both() -> None:
    """As mixup has it."""
    model, other, (x, y), (_, z) = network(), network(), batch(8, 4), batch(8, 4, seed=5)
    optimizer, criterion = wrapped(model, momentum=0.0, rho=0.3)
    output = model(x)
    (0.3 * criterion(output, y) + 0.7 * criterion(output, z)).backward()
    optimizer.step()
    loss = lambda m: 0.3 * F.cross_entropy(m(x), y) + 0.7 * F.cross_entropy(m(x), z)  # noqa: E731
    by_hand(other, SGD(other.parameters(), lr=0.1), [loss], rho=0.3)
    assert_close(model, other)


def test_what_was_not_backpropagated_into_the_gradients_is_not_repeated() -> None:
    """Evaluation with gradients on, a gradient at the input as for adversarial examples, a dropped batch."""
    model, other, (x, y) = network(), network(), batch(8, 4)
    optimizer, criterion = wrapped(model, momentum=0.0, rho=0.3)
    criterion(model(x), y).backward()
    model.zero_grad()  # dropped, behind the wrapper's back
    model.eval()
    criterion(model(2 * x), y)
    model.train()
    adversarial = x.clone().requires_grad_()
    torch.autograd.grad(criterion(model(adversarial), y), adversarial)
    criterion(model(3 * x), y).backward()
    optimizer.step()
    by_hand(other, SGD(other.parameters(), lr=0.1), [lambda m: F.cross_entropy(m(3 * x), y)], rho=0.3)
    assert_close(model, other)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    model, other, (x, y) = network(), network(), batch(8, 4)
    optimizer, criterion = wrapped(model, momentum=0.0, rho=0.3)
    calls: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(criterion(model(x), y))
        calls[-1].backward()
        return calls[-1]

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    by_hand(other, SGD(other.parameters(), lr=0.1), [lambda m: F.cross_entropy(m(x), y)], rho=0.3)
    assert_close(model, other)


def test_lbfgs_follows_the_worst_gradients_through_its_closure() -> None:
    model, other, (x, y) = network(), network(), batch(8, 4)
    criterion = nn.CrossEntropyLoss()
    optimizer = SAM(LBFGS(model.parameters(), lr=0.2, max_iter=3), model, criterion, rho=0.2)
    bare = LBFGS(other.parameters(), lr=0.2, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    def reference() -> Tensor:
        still = SGD(other.parameters(), lr=0.0)
        by_hand(other, still, [lambda m: F.cross_entropy(m(x), y)], rho=0.2)
        return F.cross_entropy(other(x), y)

    optimizer.step(closure)
    bare.step(reference)
    assert_close(model, other)


# -------------------------------------------------------------------------------------------------- scaler


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing(unscale: bool) -> None:
    model, other = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    optimizer, criterion = wrapped(model, rho=0.3, grad_scaler=scaler)
    train(other, *wrapped(other, rho=0.3), (8, 4), range(5))
    for step in range(5):
        x, y = batch(8, 4, seed=step)
        optimizer.zero_grad()
        scaler.scale(criterion(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() > 2.0**10
    assert_close(model, other)


def test_a_grad_scaler_that_it_does_not_know_of_is_refused() -> None:
    model, (x, y) = network(), batch(8, 4)
    optimizer, criterion = wrapped(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(criterion(model(x), y)).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="give it grad_scaler="):
        scaler.step(optimizer)
    assert same(model.state_dict(), before)


def test_the_second_pass_has_the_precision_of_the_first() -> None:
    model, (x, y) = mlp(dtype=torch.float32), batch(8, 4, dtype=torch.float32)
    seen: list[torch.dtype] = []

    class Watching(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            seen.append(output.dtype)
            return super().forward(output.float(), target)

    criterion = Watching()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, criterion)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16] * 3  # the loop's, the check of the first step, the worst weights


# -------------------------------------------------------------------------------------------------- wrapping


def test_groups_state_and_defaults_are_the_wrapped_optimizers() -> None:
    model = network()
    base = Adam(model.parameters(), lr=0.01)
    optimizer = SAM(base, model, nn.CrossEntropyLoss())
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert "lr: 0.01" in repr(optimizer)


def test_a_scheduler_on_the_wrapper_sets_the_rates_that_are_used() -> None:
    model, other = network(), network()
    optimizer, criterion = wrapped(model, rho=0.2)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=5)
    base = SGD(other.parameters(), lr=0.1, momentum=0.9)
    reference = lr_scheduler.OneCycleLR(base, max_lr=0.2, total_steps=5)
    for step in range(4):
        train(model, optimizer, criterion, (8, 4), range(step, step + 1))
        x, y = batch(8, 4, seed=step)
        by_hand(other, base, [lambda m, x=x, y=y: F.cross_entropy(m(x), y)], rho=0.2)
        scheduler.step()
        reference.step()
    assert_close(model, other)


def test_resuming_from_a_checkpoint_is_bit_exact() -> None:
    def fresh() -> tuple[nn.Module, SAM, nn.Module]:
        model = network("residual")
        return model, *wrapped(model, rho=lambda step: 0.1 * (step + 1))

    model, optimizer, criterion = fresh()
    train(model, optimizer, criterion, SHAPES["residual"], range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    train(model, optimizer, criterion, SHAPES["residual"], range(3, 6))
    saved = torch.load(file, weights_only=True)
    resumed, other, criterion = fresh()
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, criterion, SHAPES["residual"], range(3, 6))
    assert same(snapshot(model, optimizer), snapshot(resumed, other))


def test_a_bare_optimizers_checkpoint_loads_and_the_other_way_round() -> None:
    model, other = network(), network()
    optimizer, criterion = wrapped(model)
    train(model, optimizer, criterion, (8, 4), range(2))
    base = SGD(other.parameters(), lr=0.5, momentum=0.9)
    base.load_state_dict(optimizer.state_dict())
    assert same(base.state_dict()["state"], optimizer.base.state_dict()["state"])
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.state_dict()["sam"] == {"steps": 0, "skipped": 0}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_goes_on_alike_and_leaves_the_original_alone(duplicate: Callable[[Any], Any]) -> None:
    model = network()
    optimizer, criterion = wrapped(model, rho=0.2)
    train(model, optimizer, criterion, (8, 4), range(2))
    other_model, other, other_criterion = duplicate((model, optimizer, criterion))
    train(other_model, other, other_criterion, (8, 4), range(2, 4))
    assert optimizer.state_dict()["sam"]["steps"] == 2
    train(model, optimizer, criterion, (8, 4), range(2, 4))
    assert same(snapshot(model, optimizer), snapshot(other_model, other))


def test_nothing_stays_on_model_and_criterion_when_the_wrapper_is_gone() -> None:
    model = network()
    optimizer, criterion = wrapped(model)
    train(model, optimizer, criterion, (8, 4), range(2))
    assert optimizer._passes == []
    assert optimizer._calls.latest() is None
    del optimizer
    assert not model._forward_pre_hooks
    assert not criterion._forward_hooks
    assert not criterion._forward_pre_hooks


# -------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("cut_before_step", [False, True])
def test_neurons_go_while_it_trains(cut_before_step: bool) -> None:
    """Scores are weight times the gradient stepped by; between backward() and step() a cut does no harm."""
    model = network("residual")
    optimizer, criterion = wrapped(model, momentum=0.0, rho=0.2)
    x, y = batch(8, 2, 5, 5)
    pruner = NeuronPruner(model, optimizer, x, target=0.5, start=1, every=1, events=1)
    scored = copy.deepcopy(model)
    criterion(model(x), y).backward()
    optimizer.step()
    by_hand(scored, SGD(scored.parameters(), lr=0.0), [lambda m: F.cross_entropy(m(x), y)], rho=0.2)
    theta = {"stem": torch.zeros(4).double()}
    for i in range(4):
        theta["stem"][i] = sum(
            (layer.weight[:, i] * layer.weight.grad[:, i]).sum().item() for layer in (scored.conv, scored.head)
        )
    optimizer.zero_grad()
    if cut_before_step:
        criterion(model(x), y).backward()
    report = pruner.step()
    assert report.removed["stem"].tolist() == theta["stem"].abs().argsort()[:2].sort().values.tolist()
    if not cut_before_step:
        criterion(model(x), y).backward()
    smaller, gradients = copy.deepcopy(model), [p.grad.clone() for p in model.parameters()]
    length = torch.cat([g.flatten() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(smaller.parameters(), gradients, strict=True):
            p += 0.2 * g / length
    F.cross_entropy(smaller(x), y).backward()
    optimizer.step()
    for p, q in zip(model.parameters(), smaller.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert optimizer.skipped == 0


def test_a_pruner_takes_the_wrapper_only() -> None:
    model = network()
    optimizer, _ = wrapped(model)
    with pytest.raises(ValueError, match="give NeuronPruner the SAM itself"):
        NeuronPruner(model, optimizer.base, torch.zeros(1, 4).double(), target=0.5)


# -------------------------------------------------------------------------------------------------- refusals


def test_bad_arguments_are_refused_with_advice() -> None:
    model, criterion = network(), nn.CrossEntropyLoss()
    base = SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="criterion must be the training loop's loss module, not function"):
        SAM(base, model, F.cross_entropy)  # type: ignore[arg-type]
    for rho in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rho=.* must be a number >= 0"):
            SAM(base, model, criterion, rho=rho)
    with pytest.raises(TypeError, match=r"not the class: SAM\(SGD\(model.parameters"):
        SAM(SGD, model, criterion)  # type: ignore[arg-type]
    for inner in (FlatKFAC(base, model), SAM(base, model, criterion)):
        with pytest.raises(TypeError, match=f"is a {type(inner).__name__} already"):
            SAM(inner, model, criterion)


class Penalised(nn.Module):
    """Noise that torch's generator knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = network(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x * (-1.0) ** [0, 1, 0, 0][self.calls % 4])


@pytest.mark.parametrize("mistake", ["term outside", "foreign randomness", "changed gradients"])
def test_a_gradient_that_cannot_be_repeated_is_refused_and_nothing_changes(mistake: str) -> None:
    model = Penalised() if mistake == "foreign randomness" else network()
    optimizer, criterion = wrapped(model)
    x, y = batch(8, 4)
    loss = criterion(model(x), y)
    if mistake == "term outside":
        loss = loss + sum(p.square().sum() for p in model.parameters())
    loss.backward()
    if mistake == "changed gradients":
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=r"their gradient is not the one in p.grad \(cosine"):
        optimizer.step()
    assert same(snapshot(model, optimizer), before)


def test_a_step_that_has_seen_nothing_is_refused() -> None:
    model, (x, y) = network(), batch(8, 4)
    optimizer, _ = wrapped(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="seen nothing to repeat"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing to do


def test_weights_come_back_when_the_second_pass_fails() -> None:
    class Failing(nn.CrossEntropyLoss):
        calls = 0

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("out of luck")
            return super().forward(output, target)

    model, (x, y), criterion = network(), batch(8, 4), Failing()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, criterion, rho=0.5)
    criterion(model(x), y).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    assert same(snapshot(model, optimizer), before)
    optimizer.step()
    assert not same(snapshot(model, optimizer), before)


def test_worst_weights_without_a_finite_gradient_are_not_stepped_by() -> None:
    """The loss is fine where the step starts, and infinite a little further up."""

    class Cliff(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            loss = F.cross_entropy(output, target)
            return loss if loss < self.edge else loss * torch.inf

        edge = torch.inf

    model, other, (x, y), criterion = network(), network(), batch(8, 4), Cliff()
    criterion.edge = 1.0001 * F.cross_entropy(model(x), y).item()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), model, criterion, rho=0.5)
    criterion(model(x), y).backward()
    optimizer.step()
    F.cross_entropy(other(x), y).backward()
    SGD(other.parameters(), lr=0.1).step()
    assert same(model.state_dict(), other.state_dict())
    assert optimizer.skipped == 1
