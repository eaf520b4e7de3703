from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat.curvature.layers import (
    groups_of,
    input_dim,
    input_factor,
    inputs_per_channel,
    is_layer,
    output_dim,
    output_factor,
    output_gradients,
    project_input,
)
from tests.reference import factors, patches, seeded

Case = tuple[nn.Module, Tensor, Tensor]

# torch's own remark on even kernels; it is made once in a process, which is no behaviour to test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn, max_groups: int = 3) -> Case:
    """A convolution of any geometry, an input and a gradient at its output."""
    groups = draw(st.integers(1, max_groups))
    per_group = draw(st.integers(1, 2))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    options: dict[str, Any] = {
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "stride": (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) if padding == "numbers" else padding,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }
    outputs = groups * draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**20))
    conv = seeded(lambda: nn.Conv2d(groups * per_group, outputs, kernel, groups=groups, **options), seed)
    size = draw(st.tuples(st.integers(5, 6), st.integers(5, 6)))
    a = random(draw(st.integers(1, 2)), groups * per_group, *size, seed=seed)
    return conv, a, random(*conv(a).shape, seed=seed + 1)


@st.composite
def linears(draw: st.DrawFn) -> Case:
    """A Linear on ``[N, d]``, ``[N, T, d]`` or ``[N, T, S, d]``."""
    seed, sizes = draw(st.integers(0, 2**20)), draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    linear = seeded(lambda: nn.Linear(*sizes), seed)
    leading = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    a = random(*leading, linear.in_features, seed=seed)
    return linear, a, random(*leading, linear.out_features, seed=seed + 1)


cases = st.one_of(linears(), convolutions())
few = settings(max_examples=25, deadline=None)


@few
@given(cases)
def test_reference_patches_times_weight_are_the_layers_output(case: Case) -> None:
    layer, a, _ = case
    groups = groups_of(layer)
    weight = layer.weight.reshape(groups, -1, layer.weight[0].numel())
    by_patches = torch.einsum("ngtd,god->ngot", patches(layer, a), weight)
    output = layer(a) if layer.bias is None else layer(a) - layer(torch.zeros_like(a))
    output = output.movedim(-1, 1) if isinstance(layer, nn.Linear) else output
    assert torch.allclose(by_patches.flatten(1), output.flatten(1), rtol=0, atol=1e-12)


@few
@given(cases)
def test_factors_are_sums_over_examples_and_positions(case: Case) -> None:
    layer, a, g = case
    A, G = input_factor(layer, a), output_factor(layer, g)
    expected = factors(layer, a, g)
    assert A.shape == (len(expected), input_dim(layer), input_dim(layer))
    assert G.shape == (len(expected), output_dim(layer), output_dim(layer))
    for i, (of_inputs, of_outputs) in enumerate(expected):
        assert torch.allclose(A[i], of_inputs, rtol=1e-12, atol=1e-12)
        assert torch.allclose(G[i], of_outputs, rtol=1e-12, atol=1e-12)


@few
@given(cases, st.integers(0, 2**20))
def test_projection_is_each_patch_times_the_vector(case: Case, seed: int) -> None:
    layer, a, _ = case
    v = random(groups_of(layer), input_dim(layer), seed=seed)
    expected = torch.einsum("ngtd,gd->ngt", patches(layer, a), v)
    assert torch.allclose(project_input(layer, a, v), expected, rtol=1e-12, atol=1e-12)


@few
@given(cases, st.integers(0, 2**20))
def test_projection_is_differentiable_in_input_and_vector(case: Case, seed: int) -> None:
    layer, a, _ = case
    a.requires_grad_()
    v = random(groups_of(layer), input_dim(layer), seed=seed).requires_grad_()
    seen = torch.autograd.grad(project_input(layer, a, v).square().sum(), (a, v))
    expected = torch.autograd.grad(torch.einsum("ngtd,gd->ngt", patches(layer, a), v).square().sum(), (a, v))
    for s, e in zip(seen, expected, strict=True):
        assert torch.allclose(s, e, rtol=1e-11, atol=1e-11)


@few
@given(convolutions())
def test_a_grouped_convolution_is_its_groups_side_by_side(case: Case) -> None:
    conv, a, g = case
    assert isinstance(conv, nn.Conv2d)
    c_in, c_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    A, G = input_factor(conv, a), output_factor(conv, g)
    v = random(conv.groups, input_dim(conv), seed=0)
    projected = project_input(conv, a, v)
    for i in range(conv.groups):
        single = nn.Conv2d(
            c_in,
            c_out,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            padding_mode=conv.padding_mode,
            dtype=torch.float64,
        )
        a_i, g_i = a[:, i * c_in : (i + 1) * c_in], g[:, i * c_out : (i + 1) * c_out]
        assert torch.allclose(input_factor(single, a_i)[0], A[i], rtol=1e-12, atol=1e-12)
        assert torch.allclose(output_factor(single, g_i)[0], G[i], rtol=1e-12, atol=1e-12)
        assert torch.allclose(project_input(single, a_i, v[i : i + 1])[:, 0], projected[:, i], rtol=1e-12, atol=1e-12)


@few
@given(cases)
def test_weight_gradient_is_the_sum_of_outer_products_of_what_the_factors_are_made_of(case: Case) -> None:
    """A and G describe this layer: autograd's dloss/dW = sum_nt g_nt a_nt^T with the same g and a."""
    layer, a, g = case
    (expected,) = torch.autograd.grad(layer(a), layer.weight, g)
    by_parts = torch.einsum("ngot,ngtd->god", output_gradients(layer, g), patches(layer, a))
    assert torch.allclose(by_parts.reshape(expected.shape), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution_has_one_small_pair_per_channel(multiplier: int) -> None:
    conv = nn.Conv2d(3, 3 * multiplier, 3, padding=1, groups=3, dtype=torch.float64)
    a = random(2, 3, 4, 4, seed=0)
    g = random(2, 3 * multiplier, 4, 4, seed=1)
    assert (groups_of(conv), input_dim(conv), output_dim(conv), inputs_per_channel(conv)) == (3, 9, multiplier, 9)
    for i in range(3):
        mean_square = g[:, multiplier * i].square().mean()
        assert torch.allclose(output_factor(conv, g)[i, 0, 0], mean_square, rtol=1e-12)
        centre = a[:, i].square().sum() / 2  # the kernel's middle reads every pixel once
        assert torch.allclose(input_factor(conv, a)[i, 4, 4], centre, rtol=1e-12)


def test_reflected_border_differs_from_zeros() -> None:
    """The cases above would not notice a padding mode that is ignored alike in library and reference."""
    a = random(2, 1, 5, 5, seed=0)
    seen = []
    for mode in ("zeros", "reflect", "replicate", "circular"):
        conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode, dtype=torch.float64)
        padded = F.pad(a, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
        A = input_factor(conv, a)[0]
        assert torch.allclose(A[0, 0], padded[:, 0, :5, :5].square().sum() / 2, rtol=1e-12)
        seen.append(A)
    assert all(not torch.allclose(p, q) for i, p in enumerate(seen) for q in seen[:i])


class KeepsForward(nn.Linear):
    pass


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_only_what_computes_a_linear_map_or_a_convolution_is_a_layer() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert [is_layer(m) for m in (nn.Linear(2, 2), nn.Conv2d(1, 1, 1), KeepsForward(2, 2))] == [True] * 3
    assert [is_layer(m) for m in (OwnForward(2, 2), nn.Conv1d(1, 1, 1), nn.ReLU(), attention)] == [False] * 4
