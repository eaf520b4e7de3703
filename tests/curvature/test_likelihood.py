import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_flat.curvature.likelihood import LIKELIHOODS, Likelihood, bernoulli, categorical, gaussian, resolve

SAMPLES = 40_000


def sampled_fisher(likelihood: Likelihood, prediction: Tensor) -> Tensor:
    """Mean outer product of the per-example gradients at many copies of one prediction."""
    outputs = prediction.expand(SAMPLES, *prediction.shape).clone().requires_grad_()
    losses = likelihood(outputs, torch.Generator().manual_seed(0))
    assert losses.shape == (SAMPLES,)
    (g,) = torch.autograd.grad(losses.sum(), outputs)
    g = g.flatten(1)
    return g.T @ g / SAMPLES


def of_softmax(logits: Tensor) -> Tensor:
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


def of_bernoulli(logits: Tensor) -> Tensor:
    p = logits.sigmoid().flatten()
    return torch.diag(p * (1 - p))


@pytest.mark.parametrize(
    ("likelihood", "analytic"),
    [(categorical, of_softmax), (gaussian, lambda m: torch.eye(m.numel())), (bernoulli, of_bernoulli)],
)
@pytest.mark.parametrize("prediction", [[0.0, 0.0, 0.0], [1.5, -0.5, 0.3], [-2.0, 3.0, 0.0, 1.0]])
def test_sampled_outer_products_converge_to_the_analytic_fisher(
    likelihood: Likelihood, analytic: Callable[[Tensor], Tensor], prediction: list[float]
) -> None:
    z = torch.tensor(prediction)
    # entries have a standard deviation of at most sqrt(2) (a squared normal's): five of them over sqrt(SAMPLES)
    assert torch.allclose(sampled_fisher(likelihood, z), analytic(z), rtol=0, atol=5 * 2**0.5 / SAMPLES**0.5)


def test_gaussian_and_bernoulli_sum_over_every_axis_of_the_output() -> None:
    z = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    bound = 5 * 2**0.5 / SAMPLES**0.5
    assert torch.allclose(sampled_fisher(gaussian, z), torch.eye(4), rtol=0, atol=bound)
    assert torch.allclose(sampled_fisher(bernoulli, z), of_bernoulli(z), rtol=0, atol=bound)


def test_categorical_averages_over_positions_as_cross_entropy_does() -> None:
    """Logits [N, classes, T]: each position has signs of its own and weighs 1 / T."""
    z = torch.tensor([[1.0, -1.0], [0.0, 2.0], [0.5, 0.5]])  # 3 classes at 2 positions
    seen = sampled_fisher(categorical, z).reshape(3, 2, 3, 2)
    for t in range(2):
        assert torch.allclose(seen[:, t, :, t], of_softmax(z[:, t]) / 4, rtol=0, atol=0.01)
        assert seen[:, t, :, 1 - t].abs().max() < 0.01


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_scores_average_to_zero(name: str) -> None:
    """There is no direction in which the likelihood improves: labels come from the model's own prediction."""
    z = torch.tensor([1.5, -0.5, 0.3])
    outputs = z.expand(SAMPLES, 3).clone().requires_grad_()
    losses = LIKELIHOODS[name](outputs, torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(losses.sum(), outputs)
    assert g.std(0).min() > 0.1
    assert g.mean(0).abs().max() < 5 / SAMPLES**0.5


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_draws_follow_the_given_generator_and_leave_torchs_alone(name: str) -> None:
    outputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first, second = (LIKELIHOODS[name](outputs, generator) for _ in range(2))
    again = LIKELIHOODS[name](outputs, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def every_sign(like: Tensor, generator: torch.Generator) -> Tensor:
    """All signs there are, in the place of random ones, for as many copies of a prediction."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=like[0].numel())), dtype=like.dtype).view_as(like)


@pytest.mark.parametrize(
    ("likelihood", "analytic"),
    [(categorical, of_softmax), (gaussian, lambda m: torch.eye(m.numel(), dtype=m.dtype)), (bernoulli, of_bernoulli)],
)
@pytest.mark.parametrize("prediction", [[0.1, 0.0, -0.2], [1.5, -0.5, 0.3], [-20.0, 3.0, 0.0, 1.0]])
def test_fisher_and_its_derivative_are_the_analytic_ones_on_average_over_all_signs(
    likelihood: Likelihood, analytic: Callable[[Tensor], Tensor], prediction: list[float], monkeypatch: Any
) -> None:
    monkeypatch.setattr("kfac_flat.curvature.likelihood._signs", every_sign)
    z = torch.tensor(prediction, dtype=torch.float64, requires_grad=True)
    v = torch.linspace(-1, 2, len(z), dtype=torch.float64)
    outputs = z.expand(2 ** len(z), -1)
    (g,) = torch.autograd.grad(likelihood(outputs, torch.Generator()).sum(), outputs, create_graph=True)
    found, expected = (g @ v).square().mean(), v @ analytic(z) @ v
    assert torch.allclose(found, expected, rtol=1e-12)
    if likelihood is gaussian:  # whose Fisher is the same everywhere
        assert not g.requires_grad
        return
    derivatives = [torch.autograd.grad(radius, z)[0] for radius in (found, expected)]
    assert torch.allclose(*derivatives, rtol=1e-10, atol=1e-14)
    assert derivatives[1].abs().max() > 0.01


@pytest.mark.parametrize("likelihood", [categorical, bernoulli])
def test_each_pattern_of_signs_has_the_derivative_of_its_own_sum(likelihood: Likelihood, monkeypatch: Any) -> None:
    """Against autograd through sum_k +-sqrt(p_k) g_k, every part of it, and through weights of the examples."""
    monkeypatch.setattr("kfac_flat.curvature.likelihood._signs", every_sign)
    z = torch.tensor([1.5, -0.5, 0.3], dtype=torch.float64)
    outputs, same = (z.repeat(8, 1).requires_grad_() for _ in range(2))
    weights = torch.linspace(0.5, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64)
    losses = likelihood(outputs, torch.Generator())
    (g,) = torch.autograd.grad((weights * losses).sum(), outputs, create_graph=True)
    signs = every_sign(outputs, torch.Generator())
    if likelihood is categorical:
        p = same.softmax(1)
        expected = torch.einsum("nk,nk,nkj->nj", signs, p.sqrt(), p[:, None] - torch.eye(3, dtype=torch.float64))
    else:
        p = same.sigmoid()
        expected = signs * (p * (1 - p)).sqrt()
    expected = weights[:, None] * expected
    assert torch.allclose(g, expected, rtol=1e-12)
    found, wanted = (
        torch.autograd.grad((gradient @ v).square().sum(), (at, weights))
        for gradient, at in ((g, outputs), (expected, same))
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
        assert other.abs().max() > 0.1


def test_positions_have_derivatives_of_their_own(monkeypatch: Any) -> None:
    """Logits [N, classes, T], of which the second position is another prediction than the first."""
    monkeypatch.setattr("kfac_flat.curvature.likelihood._signs", every_sign)
    z = torch.tensor([[1.0, -1.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    outputs = z.expand(16, -1, -1)
    (g,) = torch.autograd.grad(categorical(outputs, torch.Generator()).sum(), outputs, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum() / 16, z)
    (expected,) = torch.autograd.grad(sum(of_softmax(z[:, t]).trace() / 4 for t in range(2)), z)
    assert torch.allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("likelihood", [categorical, bernoulli])
def test_derivatives_are_finite_where_probabilities_underflow(likelihood: Likelihood) -> None:
    z = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    (g,) = torch.autograd.grad(likelihood(z, torch.Generator().manual_seed(0)).sum(), z, create_graph=True)
    (derivative,) = torch.autograd.grad(g.square().sum(), z)
    assert derivative.isfinite().all()


def test_small_probabilities_are_not_lost_in_half_precision() -> None:
    """exp(-18) is nothing in float16; its root, 1e-4, is there."""
    z = torch.tensor([[6.0, 0.0, -12.0]])
    half, single = (
        torch.autograd.grad(categorical(output, torch.Generator().manual_seed(0)).sum(), output)[0]
        for output in (z.half().requires_grad_(), z.clone().requires_grad_())
    )
    assert half.dtype == torch.float16
    assert torch.equal(half, single.half())
    assert torch.equal(
        categorical(z.half(), torch.Generator().manual_seed(0)), categorical(z, torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("likelihood", [gaussian, bernoulli])
def test_a_number_per_example_may_have_an_axis_of_its_own_or_none(likelihood: Likelihood) -> None:
    with_axis = torch.tensor([[3.0], [-8.0], [0.5]], requires_grad=True)
    without = with_axis.detach().squeeze(1).requires_grad_()
    seen = []
    for output in (with_axis, without):
        losses = likelihood(output, torch.Generator().manual_seed(0))
        assert losses.shape == (3,)
        (g,) = torch.autograd.grad(losses.sum(), output, create_graph=True)
        assert g.shape == output.shape
        assert g.requires_grad == (likelihood is bernoulli)
        derivative = torch.autograd.grad(g.square().sum(), output)[0] if g.requires_grad else torch.zeros(3)
        seen.append((losses, g.flatten(), derivative.flatten()))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert seen[0][1].all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (0,)])
def test_no_examples_have_no_losses(shape: tuple[int, ...]) -> None:
    likelihood = gaussian if len(shape) == 1 else categorical
    output = torch.zeros(shape, requires_grad=True)
    losses = likelihood(output, torch.Generator())
    assert losses.shape == (0,)
    (g,) = torch.autograd.grad(losses.sum(), output)
    assert g.shape == shape


def test_a_confident_prediction_shows_its_curvature_in_every_draw() -> None:
    """Labels drawn would show next to nothing in 99 of 100 draws, and a hundred times too much in the other."""
    z = torch.tensor([[6.0, 0.0, 0.0]], dtype=torch.float64)
    expected = of_softmax(z[0]).trace()
    for seed in range(200):
        output = z.clone().requires_grad_()
        loss = categorical(output, torch.Generator().manual_seed(seed)).sum()
        (g,) = torch.autograd.grad(loss, output)
        assert 0.1 * expected < g.square().sum() < 10 * expected


def test_a_bernoulli_logit_has_its_variance_in_every_draw() -> None:
    z = torch.tensor([[3.0, -8.0]], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(bernoulli(z, torch.Generator().manual_seed(0)).sum(), z)
    assert torch.allclose(g.square(), of_bernoulli(z.detach()).diagonal(), rtol=1e-12, atol=0)


def test_categorical_refuses_what_has_no_class_axis() -> None:
    with pytest.raises(ValueError, match=r'\[N, classes, \.\.\.\], not \[5\].*likelihood="bernoulli"'):
        categorical(torch.zeros(5), torch.Generator())


def test_unknown_likelihood_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'softmax' is unknown.*bernoulli.*categorical.*gaussian.*callable"):
        resolve("softmax")


def test_names_and_callables_resolve() -> None:
    def own(output: Tensor, generator: torch.Generator) -> Tensor:
        return output.sum(1)

    assert resolve(own) is own
    assert [resolve(name) for name in ("categorical", "gaussian", "bernoulli")] == [categorical, gaussian, bernoulli]
