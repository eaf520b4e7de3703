"""rho_l against the curvature that it stands for: blocks of the Gauss-Newton matrix and of the Hessian, written out.

All matrices are dense, in float64, from one call of autograd per row. The Gauss-Newton matrix (GGN) of a mean loss,
1/N sum_n J_n^T L_n J_n with L_n the Hessian of the loss at the outputs, is the true Fisher for the two losses here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat import FlatKFAC, spectral_radii
from kfac_flat.curvature.tracker import RadiusTracker
from kfac_flat.curvature.twin import layer_names
from tests import reference
from tests.reference import batch, cross_entropy_sum, mlp, seeded

CLASSES = 3
SQUARED, CROSS_ENTROPY = "squared", "cross entropy"

# -------------------------------------------------------------------------------------------------- dense blocks


def output_factor(loss: str, output: Tensor) -> Tensor:
    """S with L_n = S_n S_n^T, ``[N, K, K]``: the identity, or columns sqrt(p_k) (p - e_k)."""
    identity = torch.eye(CLASSES, dtype=output.dtype).expand(len(output), -1, -1)
    if loss == SQUARED:
        return identity
    p = output.softmax(1).detach()
    return (p[:, :, None] - identity) * p.sqrt()[:, None, :]


def rows(outputs: Tensor, weight: Tensor) -> Tensor:
    """Derivative of each output with respect to a weight, ``[outputs, entries of the weight]``."""
    return torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0].flatten() for o in outputs.flatten()])


def ggn_block(model: nn.Module, weight: Tensor, x: Tensor, loss: str) -> Tensor:
    output = model(x)
    J = rows(output, weight).reshape(*output.shape, -1)
    half = torch.einsum("nkp,nkj->njp", J, output_factor(loss, output)).flatten(0, 1)
    return half.T @ half / len(x)


def hessian_block(model: nn.Module, weight: Tensor, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """Of the mean loss: cross entropy, or half the squared distance to the label's unit vector."""
    output = model(x)
    squared = 0.5 * (output - F.one_hot(y, CLASSES)).square().sum(1).mean()
    mean = squared if loss == SQUARED else F.cross_entropy(output, y)
    (gradient,) = torch.autograd.grad(mean, weight, create_graph=True)
    return rows(gradient, weight)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def true_radii(model: nn.Module, x: Tensor, loss: str) -> dict[str, float]:
    """rho_l as the library measures it, over all labels with their probabilities instead of one drawn of each.

    Each example comes K times, the k-th time with sqrt(K) S_k as the gradient at its output.
    """

    def all_labels(output: Tensor, generator: torch.Generator) -> Tensor:
        S = output_factor(loss, output)
        columns = S[torch.arange(len(output)), :, torch.arange(len(output)) % CLASSES]
        return math.sqrt(CLASSES) * (columns * output).sum(1)

    return spectral_radii(model, x.repeat_interleave(CLASSES, 0), likelihood=all_labels, exact=True)


def ggn_tops(model: nn.Module, x: Tensor, loss: str) -> dict[str, float]:
    return {name: top(ggn_block(model, model.get_submodule(name).weight, x, loss)) for name in layer_names(model)}


def hessian_tops(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> dict[str, float]:
    weights = {name: model.get_submodule(name).weight for name in layer_names(model)}
    return {name: top(hessian_block(model, weight, x, y, loss)) for name, weight in weights.items()}


def perceptron(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Of three layers on ``[N, 4]``."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 6), activation(), nn.Linear(6, 3)))


def convolutional(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Two convolutions and a head on ``[N, 2, 4, 4]``: 16 and 4 positions."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), activation(), nn.Conv2d(3, 2, 2, stride=2), activation()),
            *(nn.Flatten(), nn.Linear(8, CLASSES)),
        )
    )


# -------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("loss", [SQUARED, CROSS_ENTROPY])
def test_one_datum_makes_rho_the_exact_curvature_of_every_layer(loss: str) -> None:
    """With one example (and one position) the K-FAC block is the Gauss-Newton block itself."""
    model, (x, _) = perceptron(nn.Tanh), batch(1, 4)
    assert true_radii(model, x, loss) == pytest.approx(ggn_tops(model, x, loss), rel=1e-9)


def test_deep_linear_network_has_exact_blocks_on_any_batch() -> None:
    """With squared loss its gradients do not depend on the data, and its output is linear in each layer's weight."""
    model, (x, y) = perceptron(nn.Identity), batch(9, 4)
    seen = true_radii(model, x, SQUARED)
    assert seen == pytest.approx(ggn_tops(model, x, SQUARED), rel=1e-9)
    assert seen == pytest.approx(hessian_tops(model, x, y, SQUARED), rel=1e-9)


class Gated(nn.Module):
    """A nonlinear network with a layer whose input is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.gate, self.head = nn.Linear(4, 5), nn.Linear(2, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        constant = torch.tensor([[1.0, -2.0]], dtype=x.dtype).expand(len(x), -1)
        return self.head(torch.tanh(3 * self.mix(x)) * self.gate(constant))


@pytest.mark.parametrize(
    ("loss", "exact"), [(SQUARED, {"gate", "head"}), (CROSS_ENTROPY, {"gate"})], ids=[SQUARED, CROSS_ENTROPY]
)
def test_a_layer_is_exact_where_its_input_or_its_output_gradient_is_constant(loss: str, exact: set[str]) -> None:
    """The input of the gate is; so is the gradient at the outputs under squared loss. Nothing else is, or need be."""
    model, (x, _) = seeded(Gated), batch(9, 4)
    seen, expected = true_radii(model, x, loss), ggn_tops(model, x, loss)
    assert {name for name in seen if seen[name] == pytest.approx(expected[name], rel=1e-9)} == exact
    assert all(seen[name] != pytest.approx(expected[name], rel=1e-3) for name in seen.keys() - exact)


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_where_the_network_is_piecewise_linear_the_two_true_curvatures_of_a_layer_are_one(
    make: Callable[[Callable[[], nn.Module]], nn.Sequential],
) -> None:
    """Its output is linear in each layer's weight, so the Hessian's block is the Gauss-Newton block, for any loss."""
    (x, y) = batch(6, 4) if make is perceptron else batch(6, 2, 4, 4)
    kinked, smooth = make(nn.ReLU), make(nn.Tanh)
    assert hessian_tops(kinked, x, y, CROSS_ENTROPY) == pytest.approx(ggn_tops(kinked, x, CROSS_ENTROPY), rel=1e-9)
    assert hessian_tops(smooth, x, y, CROSS_ENTROPY) != pytest.approx(ggn_tops(smooth, x, CROSS_ENTROPY), rel=1e-3)


def test_one_datum_makes_rho_the_top_eigenvalue_of_the_hessian_of_a_relu_network() -> None:
    model, (x, y) = perceptron(nn.ReLU), batch(1, 4)
    expected = hessian_tops(model, x, y, CROSS_ENTROPY)
    assert min(expected.values()) > 1e-3
    assert true_radii(model, x, CROSS_ENTROPY) == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------------------------------- bounds


def inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each layer of a network of Linear layers is given, ``[N, d_in]``."""
    return {name: a.detach() for name, (a, _) in reference.read(model, torch.sum, x).items()}


def assert_within_bounds(model: nn.Module, x: Tensor, loss: str) -> None:
    """Check lambda, the top eigenvalue of the Gauss-Newton block, against rho for a network of Linear layers.

    With a_n the inputs and G_n the expected g_n g_n^T, the block is 1/N sum_n a_n a_n^T (x) G_n, and

        a_n a_n^T <= N A            gives  lambda <= N rho,
        a_n a_n^T <= |a_n|^2 I      gives  lambda <= max_n |a_n|^2 lambda_G.

    Along the top eigenvector of G what is left is 1/N sum_n (v_G^T G_n v_G) a_n a_n^T: of trace >= min_n |a_n|^2
    lambda_G and of rank <= min(N, d_in), so lambda is at least their ratio.
    """
    rho, curvature, N = true_radii(model, x, loss), ggn_tops(model, x, loss), len(x)
    for name, a in inputs(model, x).items():
        lambda_G, lengths = rho[name] / top(a.T @ a / N), a.square().sum(1)
        assert curvature[name] <= N * rho[name] * (1 + 1e-9)
        assert curvature[name] <= float(lengths.max()) * lambda_G * (1 + 1e-9)
        assert curvature[name] >= float(lengths.min()) * lambda_G / min(a.shape) * (1 - 1e-9)


@given(st.integers(0, 2**20), st.integers(1, 7), st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=40, deadline=None)
def test_rho_bounds_the_true_curvature_of_linear_layers(seed: int, examples: int, scale: float) -> None:
    model, (x, _) = mlp(seed), batch(examples, 4, seed=seed)
    assert_within_bounds(model, scale * x, CROSS_ENTROPY)


@given(st.integers(0, 2**20), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_rho_bounds_the_true_curvature_of_convolutions(seed: int, examples: int) -> None:
    """The gradient of an example is a sum over T positions, whose square is <= T times the sum of the squares.

    With a_nt a_nt^T <= N A and G the mean over N T this makes lambda <= N T^2 rho.
    """
    model, (x, _) = convolutional(), batch(examples, 2, 4, 4, seed=seed)
    rho, curvature = true_radii(model, x, CROSS_ENTROPY), ggn_tops(model, x, CROSS_ENTROPY)
    for name, positions in {"0": 16, "2": 4, "5": 1}.items():
        assert 0 < curvature[name] <= examples * positions**2 * rho[name] * (1 + 1e-9)


class Switched(nn.Module):
    """One layer on the first part of the input; the second part decides which of its outputs are seen."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, : self.layer.in_features]) * x[:, self.layer.in_features :]


def test_the_upper_bound_is_attained_by_inputs_and_gradients_that_single_out_each_other() -> None:
    model, x = Switched(CLASSES).double(), torch.eye(CLASSES, dtype=torch.float64).repeat(1, 2)
    (rho,), (curvature,) = (f(model, x, SQUARED).values() for f in (true_radii, ggn_tops))
    assert rho == pytest.approx(1 / CLASSES**2)
    assert curvature == pytest.approx(CLASSES * rho)


def test_rho_may_be_positive_where_there_is_no_curvature_at_all() -> None:
    """An example without input that alone has a gradient: no bound from below holds of all data."""
    model = Switched(1).double()
    x = torch.tensor([[1.0, 0, 0, 0], [0.0, 1, 1, 1]], dtype=torch.float64)
    assert ggn_tops(model, x, SQUARED)["layer"] == 0
    assert true_radii(model, x, SQUARED)["layer"] == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------- along a training run


def blobs(count: int) -> tuple[Tensor, Tensor]:
    """Three clouds of points that overlap a little."""
    x, y = batch(count, 4)
    return x + 2 * F.one_hot(y, 4), y


def correlation(a: list[float], b: list[float]) -> float:
    """Spearman's: of the ranks."""
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort().argsort().double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bounds_hold_and_rho_follows_the_true_curvature_along_a_training_run(seed: int) -> None:
    """Layers and steps are ranked together. What no theorem gives is asked for with a margin to what eight runs showed.

    Those had rho / GGN in 0.7 to 3.0 and, for the three seeds here, correlations of 0.91 to 0.96 with the GGN and 0.85
    with the Hessian, which has a part that rho cannot see; and of 0.78 to 0.90 between GGN and what the optimizer reads
    from one drawn label for each of 24 examples. Within a layer whose curvature hardly moves, ranks mean nothing.
    """
    (x, y), model = blobs(24), mlp(seed)
    penalty = {"mu": 1e-6, "every": 1, "survey_every": 1, "batch_fraction": 1.0}
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.3), model, **penalty, seed=seed)
    exact, read, ggn, hessian = (list[float]() for _ in range(4))
    for step in range(60):
        before = copy.deepcopy(model)  # where the optimizer reads rho
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % 4 == 0:
            assert_within_bounds(before, x, CROSS_ENTROPY)
            exact += true_radii(before, x, CROSS_ENTROPY).values()
            read += optimizer.radii().values()
            ggn += ggn_tops(before, x, CROSS_ENTROPY).values()
            hessian += hessian_tops(before, x, y, CROSS_ENTROPY).values()
    assert max(ggn) > 3 * min(ggn)
    assert all(0.5 < seen / expected < 4 for seen, expected in zip(exact, ggn, strict=True))
    assert correlation(exact, ggn) > 0.85
    assert correlation(exact, hessian) > 0.75
    assert correlation(read, ggn) > 0.65


# -------------------------------------------------------------------------------------------------- scale


def normalised() -> nn.Sequential:
    """A layer in front of BatchNorm, and one in front of a ReLU."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Linear(4, 6), nn.BatchNorm1d(6, eps=1e-18), nn.Tanh()),
            *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)),
        )
    ).train()


def relative_radii(model: nn.Module, x: Tensor) -> dict[str, float]:
    """rho_l |W_l|^2: the radius for changes of the weight relative to its length."""
    radii = spectral_radii(model, x, exact=True)
    return {name: rho * float(model.get_submodule(name).weight.detach().square().sum()) for name, rho in radii.items()}


@given(st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_weights_in_front_of_batchnorm_lower_rho_by_growing_though_the_function_stays(factor: float) -> None:
    (x, _), model = batch(12, 4), normalised()
    grown = copy.deepcopy(model)
    with torch.no_grad():
        grown[0].weight.mul_(factor)
        grown[0].bias.mul_(factor)
    assert torch.allclose(copy.deepcopy(grown)(x), copy.deepcopy(model)(x), rtol=1e-9)
    before, after = spectral_radii(model, x, exact=True), spectral_radii(grown, x, exact=True)
    assert after["0"] == pytest.approx(before["0"] / factor**2, rel=1e-9)
    assert {n: after[n] for n in ("3", "5")} == pytest.approx({n: before[n] for n in ("3", "5")}, rel=1e-9)
    assert relative_radii(grown, x) == pytest.approx(relative_radii(model, x), rel=1e-9)


@given(st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_scale_that_moves_through_a_relu_moves_rho_but_not_that_of_relative_changes(factor: float) -> None:
    (x, _), model = batch(12, 4), normalised()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[3].weight.mul_(factor)
        moved[3].bias.mul_(factor)
        moved[5].weight.div_(factor)
    before, after = spectral_radii(model, x, exact=True), spectral_radii(moved, x, exact=True)
    assert after["3"] == pytest.approx(before["3"] / factor**2, rel=1e-9)
    assert after["5"] == pytest.approx(before["5"] * factor**2, rel=1e-9)
    assert relative_radii(moved, x) == pytest.approx(relative_radii(model, x), rel=1e-9)


def test_descending_rho_lengthens_a_weight_in_front_of_batchnorm() -> None:
    """rho_l is of degree -2 in it, so <d rho_l / d W_l, W_l> = -2 rho_l (Euler); the loss has no such part."""
    (x, y), model = batch(12, 4), normalised()
    tracker = RadiusTracker(model, ["0"], reduction="max", exact=True, seed=0)
    layer = [model[0].weight, model[0].bias]
    seen = tracker.gradient((x,), {}, cross_entropy_sum(y), layer)
    along = sum(float((g * p).detach().sum()) for p, g in seen.parameters.items())
    assert along == pytest.approx(-2 * float(seen.rho), rel=1e-9)
    of_loss = torch.autograd.grad(cross_entropy_sum(y)(model(x)), layer)
    assert sum(float((g * p).detach().sum()) for g, p in zip(of_loss, layer, strict=True)) == pytest.approx(0, abs=1e-9)
