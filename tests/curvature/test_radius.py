import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat import spectral_radii
from kfac_flat.curvature.layers import groups_of, input_dim, output_dim
from kfac_flat.curvature.likelihood import categorical
from kfac_flat.curvature.radius import (
    Eigenvectors,
    LayerData,
    eigenvalues,
    factors_times,
    input_mask_gradient,
    product_rule,
    top_eigenvectors,
)
from kfac_flat.curvature.radius import factors as formed_factors
from kfac_flat.curvature.tracker import RadiusGradient, RadiusTracker
from kfac_flat.curvature.twin import layer_names
from tests import reference
from tests.reference import Residual, batch, cross_entropy_sum, factors, mlp, rho_and_gradient, seeded


def group_radii(data: LayerData, v: Eigenvectors) -> Tensor:
    of_A, of_G = eigenvalues(data, v)
    return of_A * of_G


def power_step(data: LayerData, v: Eigenvectors) -> Eigenvectors:
    return v.towards(*factors_times(data, v))


def exact_eigenvectors(data: LayerData) -> Eigenvectors:
    return top_eigenvectors(*formed_factors(data))


def convolutional(**options: Any) -> nn.Sequential:
    """A convolution of the given geometry between two plain ones, on ``[N, 2, 7, 7]``."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, **options),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


class Sequence(nn.Module):
    """Linear layers on ``[N, T, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.embed(x)))).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (mlp, (7, 4)),
    "sequence": (Sequence, (5, 4, 3)),
    "stride and padding": (lambda: convolutional(stride=2, padding=1), (4, 2, 7, 7)),
    "dilation": (lambda: convolutional(dilation=2, padding="same", bias=False), (4, 2, 7, 7)),
    "circular": (lambda: convolutional(padding=1, padding_mode="circular"), (4, 2, 7, 7)),
    "groups": (lambda: convolutional(groups=2), (4, 2, 7, 7)),
    "depthwise": (lambda: convolutional(groups=4, padding=1, padding_mode="reflect"), (4, 2, 7, 7)),
    "batchnorm and residual": (Residual, (5, 2, 5, 5)),
}


def network(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = NETWORKS[kind]
    return seeded(make).train(), *batch(*shape)


def gradient(model: nn.Module, x: Tensor, y: Tensor, only: list[str] | None = None, **options: Any) -> RadiusGradient:
    tracker = RadiusTracker(
        model, layer_names(model, only), **{"reduction": "max", "exact": True, "seed": 0, **options}
    )
    return tracker.gradient((x,), {}, cross_entropy_sum(y), list(model.parameters()))


# -------------------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("reduction", ["max", "sum"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_rho_and_its_gradient_are_those_of_the_explicit_eigenvalues(kind: str, reduction: str) -> None:
    model, x, y = network(kind)
    seen = gradient(model, x, y, reduction=reduction)
    rho, expected = rho_and_gradient(model, cross_entropy_sum(y), x, reduction=reduction)
    assert torch.isclose(seen.rho, rho, rtol=1e-9, atol=0)
    reference.assert_gradients_close(reference.in_order(seen.parameters, model.parameters()), expected)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_layer_alone_has_the_right_gradient(kind: str) -> None:
    """The maximum over layers shows only one of them: here each has its turn, grouped and strided ones included."""
    model, x, y = network(kind)
    for name in layer_names(model):
        seen = gradient(model, x, y, only=[name])
        rho, expected = rho_and_gradient(model, cross_entropy_sum(y), x, names=[name])
        assert torch.isclose(seen.rho, rho, rtol=1e-9, atol=0)
        reference.assert_gradients_close(reference.in_order(seen.parameters, model.parameters()), expected)


def test_the_gradient_has_a_part_through_the_output_gradients() -> None:
    """What differentiating A alone would give is something else altogether, so the tests above can tell."""
    model, x, y = network("batchnorm and residual")
    twin = copy.deepcopy(model)
    values = reference.radii(twin, cross_entropy_sum(y), x)
    name = max(values, key=lambda n: values[n].item())
    a, g = reference.read(twin, cross_entropy_sum(y), x)[name]
    (A, G) = factors(twin.get_submodule(name), a, g.detach())[0]
    only_a = torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1]
    partial = torch.autograd.grad(only_a, list(twin.parameters()), allow_unused=True, materialize_grads=True)
    seen = reference.in_order(gradient(model, x, y).parameters, model.parameters())
    difference = sum((p - s).square().sum() for p, s in zip(partial, seen, strict=True) if s is not None)
    assert difference > 0.01 * sum(p.square().sum() for p in partial)


@pytest.mark.parametrize("kind", ["linear", "groups", "batchnorm and residual"])
def test_gradient_agrees_with_finite_differences(kind: str) -> None:
    model, x, y = network(kind)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    seen = reference.in_order(gradient(model, x, y).parameters, model.parameters())
    slope = sum((s * d).sum() for s, d in zip(seen, direction, strict=True) if s is not None)

    def rho_at(step: float) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(d, alpha=step)
        return torch.stack(list(reference.radii(moved, cross_entropy_sum(y), x).values())).max().detach()

    h = 1e-5
    assert torch.isclose(slope, (rho_at(h) - rho_at(-h)) / (2 * h), rtol=1e-6, atol=0)


def test_rho_of_the_layers_not_asked_for_does_not_enter() -> None:
    model, x, y = network("linear")
    full = reference.radii(copy.deepcopy(model), cross_entropy_sum(y), x)
    smallest = min(full, key=lambda n: full[n].item())
    assert torch.isclose(gradient(model, x, y, only=[smallest]).rho, full[smallest], rtol=1e-9, atol=0)
    assert full[smallest] < 0.9 * max(full.values())


def test_frozen_parameters_take_no_gradient_and_hide_no_layer() -> None:
    model, x, y = network("linear")
    frozen = copy.deepcopy(model)
    frozen[0].requires_grad_(False)
    trained = [p for p in frozen.parameters() if p.requires_grad]
    tracker = RadiusTracker(frozen, layer_names(frozen, ["2", "4"]), reduction="sum", exact=True, seed=0)
    seen = tracker.gradient((x,), {}, cross_entropy_sum(y), trained)
    rho, expected = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum", names=["2", "4"])
    assert torch.isclose(seen.rho, rho, rtol=1e-9, atol=0)
    reference.assert_gradients_close(reference.in_order(seen.parameters, trained), expected[2:])


# -------------------------------------------------------------------------------------------------- streaming


def layer_data(kind: str, name: str) -> tuple[LayerData, list[tuple[Tensor, Tensor]]]:
    """A layer's data on a fixed batch and its factors, formed explicitly."""
    model, x, y = network(kind)
    layer = model.get_submodule(name)
    a, g = (t.detach() for t in reference.read(model, cross_entropy_sum(y), x)[name])
    return LayerData(layer, a, g), factors(layer, a, g)


def alignment(v: Tensor, matrix: Tensor) -> Tensor:
    return (v @ torch.linalg.eigh(matrix)[1][:, -1]).abs()


LAYERS = [("linear", "2"), ("sequence", "mix"), ("groups", "2"), ("depthwise", "2"), ("circular", "2")]


@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_power_steps_converge_to_the_top_eigenvectors(kind: str, name: str) -> None:
    data, _ = layer_data(kind, name)
    # a common part in all inputs and gradients sets the top eigenvalues apart, so that few steps suffice
    channels = (slice(None), None, None) if isinstance(data.layer, nn.Conv2d) else ()
    common = data.g.std() * torch.linspace(3, 5, data.layer.weight.shape[0], dtype=data.g.dtype)[channels]
    data = LayerData(data.layer, data.a + 3, data.g + common)
    blocks = factors(data.layer, data.a, data.g)
    v = Eigenvectors.random(data.layer, torch.Generator().manual_seed(3))
    assert v.A.shape == (groups_of(data.layer), input_dim(data.layer))
    assert v.G.shape == (groups_of(data.layer), output_dim(data.layer))
    before = eigenvalues(data, v)
    for _ in range(30):
        v = power_step(data, v)
    after = eigenvalues(data, v)
    for i, (A, G) in enumerate(blocks):
        assert alignment(v.A[i], A) > 1 - 1e-8
        assert alignment(v.G[i], G) > 1 - 1e-8
        tops = torch.linalg.eigvalsh(A)[-1], torch.linalg.eigvalsh(G)[-1]
        assert torch.isclose(after[0][i], tops[0], rtol=1e-8, atol=0)
        assert torch.isclose(after[1][i], tops[1], rtol=1e-8, atol=0)
        assert before[0][i] < 0.99 * tops[0]


@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_one_power_step_is_one_multiplication_by_the_factors(kind: str, name: str) -> None:
    data, blocks = layer_data(kind, name)
    v = Eigenvectors.random(data.layer, torch.Generator().manual_seed(3))
    stepped = power_step(data, v)
    for i, (A, G) in enumerate(blocks):
        assert torch.allclose(stepped.A[i], F.normalize(A @ v.A[i], dim=0), rtol=1e-10, atol=1e-12)
        assert torch.allclose(stepped.G[i], F.normalize(G @ v.G[i], dim=0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_exact_eigenvectors_attain_rho(kind: str, name: str) -> None:
    data, blocks = layer_data(kind, name)
    expected = max(torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] for A, G in blocks)
    assert torch.isclose(group_radii(data, exact_eigenvectors(data)).max(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("examples", [None, 2])
def test_factors_are_means_over_the_examples_however_many_rows_the_layer_reads(examples: int | None) -> None:
    """Four rows may be two examples, of two tokens each."""
    data, blocks = layer_data("groups", "2")
    A, G = formed_factors(LayerData(data.layer, data.a, data.g, examples))
    for i, (of_a, of_g) in enumerate(blocks):
        assert torch.allclose(A[i], of_a * 4 / (examples or 4), rtol=1e-10, atol=1e-14)
        assert torch.allclose(G[i], of_g, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_factors_times_are_products_with_the_explicit_factors(kind: str, name: str) -> None:
    data, blocks = layer_data(kind, name)
    v = Eigenvectors.random(data.layer, torch.Generator().manual_seed(3))
    A_v, G_v = factors_times(data, v)
    for i, (A, G) in enumerate(blocks):
        assert torch.allclose(A_v[i], A @ v.A[i], rtol=1e-10, atol=1e-14)
        assert torch.allclose(G_v[i], G @ v.G[i], rtol=1e-10, atol=1e-14)


def test_the_product_rule_joins_the_parts_of_a_batch_to_the_gradient_of_the_whole() -> None:
    data, _ = layer_data("groups", "2")
    v = exact_eigenvectors(data)

    def values(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return eigenvalues(LayerData(data.layer, a, g), v)

    a, g = data.a.detach().requires_grad_(), data.g.detach().requires_grad_()
    at = tuple(value.detach() for value in values(a, g))
    expected = torch.autograd.grad(group_radii(LayerData(data.layer, a, g), v).max(), (a, g))
    assert len(a) == 4
    shares = [len(part) / 4 for part in (a[:1], a[1:])]  # examples of each part
    parts = product_rule(values(a[:1], g[:1]), at) * shares[0] + product_rule(values(a[1:], g[1:]), at) * shares[1]
    for seen, exact in zip(torch.autograd.grad(parts, (a, g)), expected, strict=True):
        assert torch.allclose(seen, exact, rtol=1e-10, atol=1e-16)


@given(st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_no_vector_shows_more_than_the_top_eigenvalue(seed: int) -> None:
    data, blocks = layer_data("linear", "2")
    v = Eigenvectors.random(data.layer, torch.Generator().manual_seed(seed))
    (A, G) = blocks[0]
    of_a, of_g = eigenvalues(data, v)
    assert of_a[0] <= torch.linalg.eigvalsh(A)[-1]
    assert of_g[0] <= torch.linalg.eigvalsh(G)[-1]


@pytest.mark.parametrize(("kind", "steps"), [("linear", 500), ("groups", 100), ("batchnorm and residual", 500)])
def test_a_tracker_on_one_repeated_batch_finds_the_exact_gradient(kind: str, steps: int) -> None:
    model, x, y = network(kind)
    tracker = RadiusTracker(model, layer_names(model), reduction="sum", exact=False, seed=0)
    parameters = list(model.parameters())
    first = tracker.gradient((x,), {}, cross_entropy_sum(y), parameters)
    tracker.measure((x,), {}, cross_entropy_sum(y), steps=steps)
    last = tracker.gradient((x,), {}, cross_entropy_sum(y), parameters)
    rho, expected = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    assert torch.isclose(last.rho, rho, rtol=1e-8, atol=0)
    reference.assert_gradients_close(reference.in_order(last.parameters, parameters), expected, tolerance=1e-4)
    assert first.rho <= last.rho * (1 + 1e-12)


def test_each_gradient_call_moves_the_eigenvectors_by_one_power_step() -> None:
    model, x, y = network("linear")
    tracker = RadiusTracker(model, layer_names(model), reduction="max", exact=False, seed=0)
    tracker.measure((x,), {}, cross_entropy_sum(y), steps=1)
    before = dict(tracker.eigenvectors)
    tracker.gradient((x,), {}, cross_entropy_sum(y), list(model.parameters()))
    for name, (a, g) in reference.read(model, cross_entropy_sum(y), x).items():
        ((A, G),) = factors(model.get_submodule(name), a, g)
        seen = tracker.eigenvectors[name]
        assert torch.allclose(seen.A[0], F.normalize(A @ before[name].A[0], dim=0), rtol=1e-10, atol=1e-12)
        assert torch.allclose(seen.G[0], F.normalize(G @ before[name].G[0], dim=0), rtol=1e-10, atol=1e-12)
        assert not torch.allclose(seen.A, before[name].A, atol=1e-6)


@pytest.mark.parametrize("which", ["a", "g"])
def test_data_without_a_direction_leave_the_eigenvectors_as_they_are(which: str) -> None:
    data, _ = layer_data("linear", "2")
    v = Eigenvectors.random(data.layer, torch.Generator().manual_seed(0))
    for bad in (0.0, float("nan")):
        broken = LayerData(
            data.layer, data.a * bad if which == "a" else data.a, data.g * bad if which == "g" else data.g
        )
        after, kept = power_step(broken, v), v.A if which == "a" else v.G
        assert torch.equal(after.A if which == "a" else after.G, kept)
        other = (after.G, v.G) if which == "a" else (after.A, v.A)
        assert not torch.allclose(*other)


def test_starting_vectors_depend_on_the_seed_alone() -> None:
    layer = nn.Linear(3, 4)
    draws = [Eigenvectors.random(layer, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0].A, draws[1].A)
    assert torch.equal(draws[0].G, draws[1].G)
    assert not torch.allclose(draws[0].A, draws[2].A)
    assert torch.allclose(draws[0].A.norm(dim=1), torch.ones(1))


def test_each_layer_and_each_seed_starts_elsewhere() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    starts = []
    for seed in (5, 5, 6):
        tracker = RadiusTracker(model, layer_names(model), reduction="max", exact=False, seed=seed)
        tracker.measure((batch(6, 4)[0],), {}, torch.sum, steps=0)
        starts.append(tracker.eigenvectors)
    assert torch.equal(starts[0]["0"].A, starts[1]["0"].A)
    assert not torch.allclose(starts[0]["0"].A, starts[0]["1"].A)
    assert not torch.allclose(starts[0]["0"].A, starts[2]["0"].A)


def test_half_precision_data_are_squared_in_single_precision() -> None:
    layer = nn.Linear(3, 2).half()
    a, g = torch.full((4, 3), 1e-3).half(), torch.full((4, 2), 1e-5).half()
    data = LayerData(layer, a, g).to_working_precision()
    expected = max(
        torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] for A, G in factors(layer, a.double(), g.double())
    )
    assert torch.isclose(group_radii(data, exact_eigenvectors(data)).max().double(), expected, rtol=1e-4, atol=0)


# -------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", NETWORKS)
def test_input_mask_gradient_is_autograd_through_a_mask_in_a_alone(kind: str) -> None:
    model, x, y = network(kind)
    tracker = RadiusTracker(model, layer_names(model), reduction="sum", exact=True, seed=0)
    seen = tracker.gradient((x,), {}, cross_entropy_sum(y), list(model.parameters())).input_masks
    data = reference.read(model, cross_entropy_sum(y), x)
    assert set(seen) == set(data)
    for name, (a, g) in data.items():
        layer, a, g = model.get_submodule(name), a.detach(), g.detach()
        channels = a.shape[1] if isinstance(layer, nn.Conv2d) else a.shape[-1]
        mask = torch.ones(channels, dtype=a.dtype, requires_grad=True)
        masked = a * (mask[:, None, None] if isinstance(layer, nn.Conv2d) else mask)
        rho_l = torch.stack(
            [torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] for A, G in factors(layer, masked, g)]
        ).max()
        (expected,) = torch.autograd.grad(rho_l, mask)
        assert seen[name].shape == expected.shape
        assert torch.allclose(seen[name], expected, rtol=1e-8, atol=1e-10 * float(rho_l.detach()))
        # A is of degree two in its mask (Euler)
        assert torch.isclose(seen[name].sum(), 2 * rho_l.detach(), rtol=1e-9, atol=0)


def test_only_the_layer_that_attains_the_maximum_has_a_mask_gradient() -> None:
    model, x, y = network("linear")
    values = reference.radii(model, cross_entropy_sum(y), x)
    seen = gradient(model, x, y).input_masks
    assert list(seen) == [max(values, key=lambda n: values[n].item())]


def test_mask_gradient_of_a_grouped_layer_is_zero_outside_the_group_that_attains_rho() -> None:
    data, blocks = layer_data("groups", "2")
    tops = [float(torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1]) for A, G in blocks]
    v = exact_eigenvectors(data)
    by_group = input_mask_gradient(data.layer, group_radii(data, v), v).reshape(2, -1)
    attains = tops.index(max(tops))
    assert by_group[attains].sum() > 0
    assert torch.equal(by_group[1 - attains], torch.zeros_like(by_group[1 - attains]))


# ---------------------------------------------------------------------------------------------- without an optimizer


def test_spectral_radii_measures_with_the_sampled_fisher_and_changes_nothing() -> None:
    """Gaussian noise on one output: g = noise * d output, so the linear layer at the end has G = mean of noise^2."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))).train()
    x, _ = batch(1000, 3)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    seen = spectral_radii(model, x, likelihood="gaussian", exact=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    normalised = copy.deepcopy(model)[:2](x).detach()
    expected = float(torch.linalg.eigvalsh(normalised.T @ normalised / len(x))[-1])
    assert seen["2"] == pytest.approx(expected, rel=0.2)  # variance of a chi-square mean: 2 / 1000
    assert spectral_radii(model, x, likelihood="gaussian", layers=["2"]).keys() == {"2"}


def test_of_an_output_with_several_parts_the_logits_are_measured_and_a_callable_sees_all() -> None:
    class Parts(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": x, "logits": self.net(x)}

    net, (x, _) = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), batch(20, 3)
    expected = list(spectral_radii(net, x, exact=True).values())
    assert list(spectral_radii(Parts(net), x, exact=True).values()) == expected
    told = spectral_radii(Parts(net), x, exact=True, likelihood=lambda o, g: categorical(o["logits"], g))
    assert list(told.values()) == expected
    with pytest.raises(TypeError, match="returns a tuple without logits"):
        spectral_radii(nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)).double(), x)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_spectral_radii_of_one_number_per_example_need_no_axis_for_it(likelihood: str) -> None:
    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(1)

    (x, _), layers = batch(20, 3), seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    expected = spectral_radii(layers, x, likelihood=likelihood)
    assert spectral_radii(Squeezed(*layers), x, likelihood=likelihood) == expected
    assert min(expected.values()) > 0


def test_spectral_radii_can_be_measured_where_a_model_is_evaluated() -> None:
    model, x, _ = network("linear")
    expected = spectral_radii(model, x)
    with torch.inference_mode():
        assert spectral_radii(model, x.clone()) == expected
    with torch.no_grad():
        assert spectral_radii(model, x) == expected


@pytest.mark.parametrize("kind", ["linear", "circular"])
def test_spectral_radii_by_power_iteration_agree_with_exact_ones(kind: str) -> None:
    model, x, _ = network(kind)
    streamed, exact = spectral_radii(model, x), spectral_radii(model, x, exact=True)
    for name in exact:
        assert streamed[name] == pytest.approx(exact[name], rel=1e-3)
    assert len(exact) == 3
