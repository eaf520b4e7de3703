from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests import reference
from tests.optimizer.loops import criterion_of, gradients, penalty, plain, times
from tests.reference import Residual, assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (8, 4)),
    "residual": (lambda: seeded(Residual), (6, 2, 5, 5)),
}


# -------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_added_is_mu_times_the_gradient_of_rho(network: str, reduction: str) -> None:
    make, shape = NETWORKS[network]
    model, (x, y) = make(), batch(*shape)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction=reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_rho_max_is_a_threshold_and_does_not_change_the_gradient_above_it() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    below = penalty(model, plain(model, mu=0.3, rho_max=0.99 * float(rho)), x, y)
    assert_gradients_close(below, times(0.3, gradient))
    for threshold in (1.01 * float(rho), 100.0):
        above = penalty(model, plain(model, mu=0.3, rho_max=threshold), x, y)
        assert all(torch.equal(d, torch.zeros_like(d)) for d in above)


def test_the_penalty_is_on_at_the_same_place_on_which_the_objective_has_its_gradient() -> None:
    """p.grad as the base sees it is autograd's gradient of loss + mu max(0, rho - K), written down in one piece."""
    model, (x, y) = seeded(Residual), batch(6, 2, 5, 5)
    twin = copy.deepcopy(model)
    values = torch.stack(list(reference.radii(twin, cross_entropy_sum(y), x).values()))
    objective = F.cross_entropy(twin(x), y) + 0.2 * (values.max() - 0.01).clamp(min=0)
    expected = torch.autograd.grad(objective, list(twin.parameters()))
    seen: list[list[Tensor]] = []
    optimizer = plain(model, mu=0.2, rho_max=0.01)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients(model)))
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    assert_gradients_close(list(seen[0]), list(expected))


def test_a_whole_trajectory_is_that_of_the_explicit_objective() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    twin = copy.deepcopy(model)
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = plain(model, base=base, mu=0.1, reduction="sum")
    bare = SGD(twin.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        penalty(model, optimizer, x, y)
        bare.zero_grad()
        _, gradient = rho_and_gradient(twin, cross_entropy_sum(y), x, reduction="sum")
        F.cross_entropy(twin(x), y).backward()
        for p, g in zip(twin.parameters(), gradient, strict=True):
            p.grad.add_(g, alpha=0.1)
        bare.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(model[0].weight, mlp()[0].weight, atol=1e-3)


def test_another_layer_at_the_maximum_is_differentiated_from_the_next_refresh_on() -> None:
    """Which layer it is, is known from the refresh before: that saves waiting for the device."""
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3)
    values = reference.radii(model, cross_entropy_sum(y), x)
    before = max(values, key=lambda n: values[n].item())
    penalty(model, optimizer, x, y)
    x = 10 * x
    values = reference.radii(model, cross_entropy_sum(y), x)
    after = max(values, key=lambda n: values[n].item())
    assert before != after
    for name in (before, after):
        _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, names=[name])
        assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
        assert optimizer.rho == pytest.approx(values[after].item(), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_logarithmic_penalty_has_the_gradient_of_log_rho_whatever_its_scale(scale: float) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    criterion = nn.CrossEntropyLoss()

    class Scaled(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return scale * criterion(output, target)

    def scaled_sum(output: Tensor) -> Tensor:
        return scale * cross_entropy_sum(y)(output)

    rho, gradient = rho_and_gradient(model, scaled_sum, x)
    seen = penalty(model, plain(model, Scaled(), mu=0.3, penalty="log", rho_max=0.5 * float(rho)), x, y)
    assert_gradients_close(seen, times(0.3 / float(rho), gradient))
    _, unscaled = rho_and_gradient(model, cross_entropy_sum(y), x)
    assert_gradients_close(seen, times(0.3 / (float(rho) / scale**2), unscaled))
    above = penalty(model, plain(model, Scaled(), mu=0.3, penalty="log", rho_max=2 * float(rho)), x, y)
    assert not any(g.any() for g in above)


@pytest.mark.parametrize("eigenpairs", ["exact", "streaming"])
def test_the_logarithmic_penalty_of_a_network_without_curvature_is_zero(eigenpairs: str) -> None:
    """Where log rho has no gradient at all."""
    model, (x, y) = mlp(), batch(8, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = plain(model, mu=0.3, penalty="log", eigenpairs=eigenpairs)
    assert not any(g.any() for g in penalty(model, optimizer, 0 * x, y))
    assert optimizer.rho == optimizer.skipped == 0


def test_between_surveys_only_the_layer_known_to_attain_the_maximum_is_read_and_differentiated() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, survey_every=3)
    first = reference.radii(model, cross_entropy_sum(y), x)
    before = max(first, key=lambda n: first[n].item())
    penalty(model, optimizer, x, y)
    x = 10 * x
    now = reference.radii(model, cross_entropy_sum(y), x)
    after = max(now, key=lambda n: now[n].item())
    assert before != after
    for active in (before, before, before, after):  # two refreshes between surveys, and the one that finds out
        _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, names=[active])
        assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
        read = {name for name, value in optimizer.radii().items() if value == pytest.approx(now[name].item(), rel=1e-9)}
        assert read == ({before} if optimizer._steps < 4 else set(now))


def active_layer(model: nn.Module, x: Tensor, y: Tensor) -> str:
    values = reference.radii(model, cross_entropy_sum(y), x)
    return max(values, key=lambda name: values[name].item())


def test_surveys_count_refreshes_and_not_steps() -> None:
    """With a refresh at every second step, the third is the next survey; one more, and its finding is acted on."""
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, every=2, survey_every=2)
    before, after = active_layer(model, x, y), active_layer(model, 10 * x, y)
    assert before != after
    penalty(model, optimizer, x, y)
    for number, active in enumerate([before] * 5 + [after] * 2, start=1):
        seen = penalty(model, optimizer, 10 * x, y)
        if number % 2 == 0:
            _, gradient = rho_and_gradient(model, cross_entropy_sum(y), 10 * x, names=[active])
            assert_gradients_close(seen, times(2 * 0.3, gradient), tolerance=1e-8)


def test_after_a_pause_of_the_penalty_all_layers_are_looked_at() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=lambda step: 0.0 if 0 < step < 5 else 0.3, survey_every=4)
    for _ in range(5):
        penalty(model, optimizer, x, y)
    after = active_layer(model, 10 * x, y)
    assert active_layer(model, x, y) != after
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), 10 * x)
    penalty(model, optimizer, 10 * x, y)
    assert_gradients_close(penalty(model, optimizer, 10 * x, y), times(0.3, gradient))


class Switched(nn.Module):
    """A part of it that has the largest radius can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.extra, self.on = mlp(), nn.Linear(4, 3), True

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.extra(30 * x) if self.on else 0)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_between_surveys_a_layer_that_takes_no_part_any_more_gives_way_to_the_others(reduction: str) -> None:
    model, (x, y) = seeded(Switched), batch(8, 4)
    optimizer = plain(model, mu=0.3, survey_every=4, reduction=reduction)
    penalty(model, optimizer, x, y)
    assert active_layer(model, x, y) == "extra"
    model.on = False
    rho, gradient = rho_and_gradient(model.net, cross_entropy_sum(y), x, reduction=reduction)
    for _ in range(2):
        assert_gradients_close(penalty(model, optimizer, x, y)[: len(gradient)], times(0.3, gradient))
        assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
        assert "extra" not in optimizer.radii()


def test_training_with_the_penalty_ends_flatter_than_without() -> None:
    def final_rho(mu: float) -> float:
        model, (x, y) = mlp(), batch(40, 4)
        optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model, mu=mu, every=2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return max(r.item() for r in reference.radii(model, cross_entropy_sum(y), x).values())

    assert final_rho(0.3) < 0.8 * final_rho(0.0)


def test_mask_gradients_are_mu_times_those_of_rho_through_the_layers_input() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    data = reference.read(model, cross_entropy_sum(y), x)
    values = reference.radii(model, cross_entropy_sum(y), x)
    name = max(values, key=lambda n: values[n].item())
    a, g = (t.detach() for t in data[name])
    mask = torch.ones(a.shape[1], dtype=a.dtype, requires_grad=True)
    ((A, G),) = reference.factors(model.get_submodule(name), a * mask, g)
    (expected,) = torch.autograd.grad(torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1], mask)
    optimizer = plain(model, mu=0.3)
    penalty(model, optimizer, x, y)
    ((weight, seen),) = optimizer.input_mask_gradients().items()
    assert weight is model.get_submodule(name).weight
    assert torch.allclose(seen, 0.3 * expected, rtol=1e-8, atol=1e-12)
    off = plain(model, mu=0.3, rho_max=1e6)
    penalty(model, off, x, y)
    assert all(not m.any() for m in off.input_mask_gradients().values())


# -------------------------------------------------------------------------------------------------- which labels


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_criterions_own_reduction_does_not_change_the_penalty(reduction: str) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    seen = penalty(model, plain(model, nn.CrossEntropyLoss(reduction=reduction), mu=0.3), x, y)
    assert_gradients_close(seen, times(0.3, gradient))


def test_targets_may_be_given_by_keyword() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    for call in (lambda c: c(model(x), target=y), lambda c: c(input=model(x), target=y)):
        optimizer = plain(model, mu=0.3)
        optimizer.zero_grad()
        call(criterion_of(optimizer)).backward()
        own = gradients(model)
        optimizer.step()
        added = [g - o for g, o in zip(gradients(model), own, strict=True)]
        assert_gradients_close(added, times(0.3, gradient))


def test_the_empirical_fisher_takes_the_criterion_for_the_loss_that_it_is() -> None:
    """Label smoothing and squared error, against autograd on the same loss summed over examples."""
    model, (x, y) = mlp(), batch(8, 4)
    target = F.one_hot(y, 3).double()
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.2)
    squared = nn.MSELoss()
    sums = {
        smoothed: lambda output: F.cross_entropy(output, y, label_smoothing=0.2, reduction="sum"),
        squared: lambda output: (output - target).square().mean(1).sum(),
    }
    for criterion, loss in sums.items():
        _, gradient = rho_and_gradient(model, loss, x)
        seen = penalty(model, plain(model, criterion, mu=0.3), x, y if criterion is smoothed else target)
        assert_gradients_close(seen, times(0.3, gradient))


def own_likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
    """Labels that are the most probable classes: nothing random, so that a reference can follow."""
    return F.cross_entropy(output, output.detach().argmax(1), reduction="none")


def test_a_callable_likelihood_supplies_the_labels() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    most_probable = model(x).argmax(1)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(most_probable), x)
    seen = penalty(model, plain(model, mu=0.3, fisher="sampled", likelihood=own_likelihood), x, y)
    assert_gradients_close(seen, times(0.3, gradient))
    assert (most_probable != y).any()


@pytest.mark.parametrize(("likelihood", "outputs"), [("categorical", 3), ("gaussian", 2), ("bernoulli", 1)])
def test_random_signs_give_a_reproducible_penalty_whose_radius_fits_the_true_fisher(
    likelihood: str, outputs: int
) -> None:
    """On the last layer: g has the likelihood's Fisher as covariance, averaged over the batch."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)))
    x, _ = batch(3000, 4)
    target = torch.zeros(3000, outputs, dtype=torch.float64)
    output = model(x).detach()
    p = output.softmax(1) if likelihood == "categorical" else output.sigmoid()
    fisher = {
        "categorical": torch.diag(p.mean(0)) - p.T @ p / len(p),
        "gaussian": torch.eye(outputs, dtype=torch.float64),
        "bernoulli": torch.diag((p * (1 - p)).mean(0)),
    }[likelihood]
    hidden = model[:2](x).detach()
    expected = torch.linalg.eigvalsh(hidden.T @ hidden / len(x))[-1] * torch.linalg.eigvalsh(fisher)[-1]
    added = []
    for seed in (0, 0, 1):
        options: dict[str, Any] = {"fisher": "sampled", "likelihood": likelihood, "layers": ["2"], "seed": seed}
        optimizer = plain(model, mu=0.3, **options)
        added.append(penalty(model, optimizer, x, target, nn.MSELoss()))
        assert optimizer.rho == pytest.approx(float(expected), rel=0.15)
        assert all(d.isfinite().all() for d in added[-1])
    assert all(torch.equal(d, e) for d, e in zip(added[0], added[1], strict=True))
    differs = any(not torch.allclose(d, e) for d, e in zip(added[0], added[2], strict=True))
    assert differs == (outputs > 1)  # the signs of a single logit do not matter


def test_a_binary_logit_may_come_without_an_axis_of_its_own() -> None:
    """``model(x).squeeze(1)`` for BCEWithLogitsLoss has the penalty of ``model(x)``."""

    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(1)

    layers = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)))
    (x, _), y = batch(8, 4), torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)
    penalties = []
    for model, target in ((layers, y[:, None]), (Squeezed(*layers), y)):
        optimizer = plain(model, mu=0.3, fisher="sampled", likelihood="bernoulli")
        penalties.append(penalty(model, optimizer, x, target, nn.BCEWithLogitsLoss()))
    assert_gradients_close(*penalties)
    assert any(g.any() for g in penalties[0])


def test_labels_are_drawn_anew_at_each_refresh() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, fisher="sampled")
    first, second = (penalty(model, optimizer, x, y) for _ in range(2))
    assert any(not torch.allclose(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**31, 2**63 - 1, 2**80])
def test_every_whole_number_is_a_seed_at_every_step(seed: int) -> None:
    model, (x, y) = mlp(), batch(8, 4)
    optimizer = plain(model, mu=0.3, fisher="sampled", eigenpairs="streaming", seed=seed)
    optimizer._steps = 2**62
    assert any(g.any() for g in penalty(model, optimizer, x, y))


# -------------------------------------------------------------------------------------------------- how often, how much


@pytest.mark.parametrize(("fraction", "examples"), [(1.0, 8), (0.5, 4), (0.25, 2), (0.01, 2)])
def test_batch_fraction_takes_the_first_examples_and_at_least_two(fraction: float, examples: int) -> None:
    model, (x, y) = seeded(Residual), batch(8, 2, 5, 5)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y[:examples]), x[:examples])
    seen = penalty(model, plain(model, mu=0.3, batch_fraction=fraction), x, y)
    assert_gradients_close(seen, times(0.3, gradient))


def test_a_refresh_adds_the_penalty_of_all_steps_until_the_next_and_these_are_the_bases_own() -> None:
    model = mlp()
    optimizer = plain(model, base=SGD(model.parameters(), lr=0.05), mu=0.3, every=3)
    for step in range(7):
        x, y = batch(8, 4, seed=step)
        _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
        added = penalty(model, optimizer, x, y)
        if step % 3 == 0:
            assert_gradients_close(added, times(3 * 0.3, gradient))
        else:
            assert all(torch.equal(a, torch.zeros_like(a)) for a in added)


def test_layers_restrict_the_penalty() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, names=["2"])
    optimizer = plain(model, mu=0.3, layers=["2"])
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert set(optimizer.radii()) == {"2"}


def test_streaming_eigenpairs_come_to_the_exact_penalty_on_a_repeated_batch() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x)
    optimizer = plain(model, mu=0.3, eigenpairs="streaming")
    for _ in range(300):
        seen = penalty(model, optimizer, x, y)
    assert_gradients_close(seen, times(0.3, gradient), tolerance=1e-6)
