"""What happens around a training loop that is not as it should be, and must not matter."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC, likelihood
from kfac_flat.curvature import tracker


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def step(model: nn.Module, optimizer: FlatKFAC, x: Tensor | None = None) -> None:
    x = torch.randn(12, 4) if x is None else x
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()


def test_an_interrupt_in_the_first_refresh_leaves_an_optimizer_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
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


def test_the_bound_holds_at_every_step_and_not_only_where_the_penalty_was_computed() -> None:
    model = net()
    base = SGD(model.parameters(), lr=0.0)
    optimizer = FlatKFAC(base, model, mu=1.0, every=4, clip=0.5)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    for i in range(4):
        x = torch.randn(12, 4) * (30 if i == 0 else 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(12) % 3).backward()
        loss_gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        added = (seen[-1] - loss_gradient).norm()
        assert 0 < added <= 0.5 * loss_gradient.norm() * (1 + 1e-4)


def test_a_model_that_changes_its_dtype_is_followed() -> None:
    model = net()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
    step(model, optimizer)
    model.double()
    step(model, optimizer, torch.randn(12, 4, dtype=torch.float64))
    assert optimizer.rho > 0


def test_mask_terms_of_layers_with_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.1, reduction="sum", clip=None)
    step(model, optimizer)
    terms = optimizer.state_dict()["kfac_flat"]["mask_terms"]
    both = optimizer.input_mask_gradients()[model[2].weight]
    assert torch.allclose(both, terms["2"] + terms["4"])
    assert (terms["2"] > 0).any()
    assert (terms["4"] > 0).any()


class Mixing(nn.Module):
    """Needs the whole batch: the adjacency has an axis of examples on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(torch.tanh(adjacency @ self.a(x)))


def test_a_model_that_needs_its_whole_batch_gets_it_with_a_warning() -> None:
    model = Mixing()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4), torch.rand(6, 6)), torch.arange(6) % 3).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="does not run on a part of its batch.*batch_fraction=1"):
        run()
    run()  # and says it once
    assert optimizer.rho > 0


@pytest.mark.parametrize(("dtype", "logit"), [(torch.bfloat16, -6.0), (torch.float16, -9.0)])
def test_labels_drawn_in_half_precision_follow_the_distribution(dtype: torch.dtype, logit: float) -> None:
    logits = torch.full([2_000_000, 1], logit, dtype=dtype, requires_grad=True)
    losses = likelihood.bernoulli(logits, torch.Generator().manual_seed(0))
    positive = (losses > -logit / 2).float().mean()  # the loss of a label 1 is about -logit, that of a 0 about nothing
    assert float(positive) == pytest.approx(float(torch.sigmoid(torch.tensor(logit))), rel=0.2)


def test_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
        try:
            for _ in range(10):
                step(model, optimizer)
        except RuntimeError as error:
            failures.append(error)
        except AttributeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_model_that_works_in_place_on_its_input_changes_it_once() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(1.0)
            return self.fc(x)

    model, x = InPlace(), torch.zeros(6, 4)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1, batch_fraction=1.0, eigenpairs="exact")
    step(model, optimizer, x)
    assert torch.equal(x, torch.full_like(x, -1.0))
    g = optimizer.radii()["fc"] / 4  # A has the one eigenvalue |a|^2 = 4, with every input at -1
    assert 0 < g < 1


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.mode = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), "once"

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        for _ in range({"off": 0, "once": 1, "twice": 2}[self.mode]):
            x = 9 * self.b(x)
        return self.c(x)


def test_a_layer_that_is_read_no_more_is_no_part_of_rho() -> None:
    model = Switching()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.01), model, every=1, survey_every=1)
    step(model, optimizer)
    model.mode = "off"
    step(model, optimizer)
    step(model, optimizer)
    assert set(optimizer.radii()) == {"a", "c"}
    assert optimizer.rho == pytest.approx(max(optimizer.radii().values()))
    model.mode = "twice"
    step(model, optimizer)
    assert "more than once" in optimizer.skipped_layers["b"]
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer)


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


def test_a_mask_term_follows_the_bound_and_a_mu_of_zero_clears_it() -> None:
    terms = []
    for clip in (None, 1e-3):
        model = net()
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=lambda s: 5.0 if s == 0 else 0.0, clip=clip)
        torch.manual_seed(1)
        step(model, optimizer)
        terms.append({k: v.clone() for k, v in optimizer.state_dict()["kfac_flat"]["mask_terms"].items()})
        direct = optimizer.input_mask_gradients()
        assert direct
        if clip is not None:
            raw = terms[-1][next(iter(terms[-1]))]
            assert next(iter(direct.values())).norm() < 0.1 * raw.norm()
        step(model, optimizer)
        assert optimizer.input_mask_gradients() == {}


def test_a_batch_of_one_example_and_a_schedule_out_of_range() -> None:
    model = net()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, every=1)
    step(model, optimizer, torch.randn(1, 4))
    assert optimizer.rho > 0
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=lambda step: -1.0)
    with pytest.raises(ValueError, match=r"must be numbers >= 0.*returned -1\.0"):
        step(model, optimizer)


def test_a_criterion_called_on_another_shape_than_the_models_output_is_refused() -> None:
    model, criterion = nn.Linear(4, 1), nn.MSELoss()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, fisher="empirical", criterion=criterion)
    criterion(model(torch.randn(6, 4)).squeeze(1), torch.randn(6)).backward()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="put what lies between into the model or into the criterion"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_a_single_output_is_no_categorical_distribution() -> None:
    model = nn.Linear(4, 1)
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    model(torch.randn(6, 4)).square().mean().backward()
    with pytest.raises(ValueError, match=r'likelihood="bernoulli".*likelihood="gaussian"'):
        optimizer.step()
