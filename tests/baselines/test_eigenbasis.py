"""In the Kronecker-factored eigenbasis the Fisher is diagonal, and a bottleneck computes what is left of the layer."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.eigenbasis import Eigenbasis, Positions, RotatedLayer, channel_factors
from kfac_flat.curvature.kronecker import KroneckerProduct
from kfac_flat.curvature.radius import LayerData
from tests.baselines.test_kron_pruning import random, vec
from tests.curvature.test_layers import Case, convolutions, linears
from tests.reference import factors

layers = st.one_of(linears(), convolutions(max_groups=1))
# torch's own remark on even kernels; it is made once in a process, which is no behaviour to test
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
few = settings(max_examples=30, deadline=None)


def covariance(size: int, seed: int) -> Tensor:
    m = random(size, size, seed=seed)
    return m @ m.T


def basis_of(layer: RotatedLayer, seed: int) -> Eigenbasis:
    """The basis of random factors of the layer's core."""
    d_in, d_out = layer.present
    return Eigenbasis.of(KroneckerProduct(covariance(d_in, seed), covariance(d_out, seed + 1)))


def some_of(size: int, draw: Any) -> Tensor:
    kept = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return torch.tensor(sorted(kept))


# ---------------------------------------------------------------- importance


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**20))
def test_importance_is_the_quadratic_form_of_the_dense_fisher(d_out: int, d_in: int, k: int, seed: int) -> None:
    A, G, W = covariance(d_in, seed), covariance(d_out, seed + 1), random(d_out, d_in, k, seed=seed + 2)
    basis = Eigenbasis.of(KroneckerProduct(A, G))
    dense = torch.kron(torch.kron(A, torch.eye(k).double()), G)  # columns of the weight: channel by entry of the kernel
    of_inputs, of_outputs = basis.importances(W)
    for j in range(d_in):
        q = basis.Q_A[:, j]
        removed = -torch.einsum("oik,i,j->ojk", W, q, q)
        flat = vec(removed.flatten(1))
        assert torch.isclose(of_inputs[j], flat @ dense @ flat, rtol=1e-8, atol=1e-10)
    for p in range(d_out):
        q = basis.Q_G[:, p]
        flat = vec(-torch.einsum("oik,o,p->pik", W, q, q).flatten(1))
        assert torch.isclose(of_outputs[p], flat @ dense @ flat, rtol=1e-8, atol=1e-10)


@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**20), st.data())
def test_importances_of_what_goes_on_one_side_add_up(d_out: int, d_in: int, seed: int, data: st.DataObject) -> None:
    """There are no cross terms: that is what the basis is for."""
    A, G, W = covariance(d_in, seed), covariance(d_out, seed + 1), random(d_out, d_in, 1, seed=seed + 2)
    basis, gone = Eigenbasis.of(KroneckerProduct(A, G)), some_of(d_in, data.draw)
    Q = basis.Q_A[:, gone]
    flat = vec(-(W[..., 0] @ Q @ Q.T))
    assert torch.isclose(basis.importances(W)[0][gone].sum(), flat @ torch.kron(A, G) @ flat, rtol=1e-8, atol=1e-10)


@few
@given(st.integers(1, 5), st.integers(0, 2**20))
def test_the_basis_is_orthogonal_and_rotation_loses_nothing(size: int, seed: int) -> None:
    basis = Eigenbasis.of(KroneckerProduct(covariance(size, seed), covariance(2, seed)))
    W = random(2, size, 3, seed=seed)
    for Q in (basis.Q_A, basis.Q_G):
        assert torch.allclose(Q.T @ Q, torch.eye(len(Q)).double(), atol=1e-12)
    back = torch.einsum("op,pjk,ij->oik", basis.Q_G, basis.rotate(W), basis.Q_A)
    assert torch.allclose(back, W, atol=1e-12)


def test_eigenvalues_that_rounding_has_made_negative_count_for_nothing() -> None:
    A = torch.diag(torch.tensor([-1e-17, 1.0]).double())
    basis = Eigenbasis.of(KroneckerProduct(A, torch.eye(1).double()))
    assert basis.d_A.tolist() == [0.0, 1.0]


@few
@given(layers)
def test_the_channels_factor_is_the_mean_of_the_kernels_diagonal_blocks(case: Case) -> None:
    layer, a, g = case
    ((A, G),) = factors(layer, a, g)
    found_A, found_G = channel_factors(LayerData(layer, a, g))  # type: ignore[arg-type]
    k = layer.weight[0, 0].numel()
    blocks = rearrange(A, "(c k) (d l) -> k l c d", k=k, l=k)
    expected = torch.stack([blocks[i, i] for i in range(k)]).mean(0)
    assert torch.allclose(found_A, expected, atol=1e-11)
    assert torch.allclose(found_G, G, atol=1e-11)


# ---------------------------------------------------------------- bottlenecks


def projected(layer: nn.Module, by_patch: bool, *steps: tuple[Tensor, Tensor]) -> nn.Module:
    """The layer with its weight multiplied by the matrices of all steps: the slow and obvious way."""
    result = copy.deepcopy(layer)
    weight = layer.weight.detach()
    W = weight.flatten(1)[..., None] if by_patch or isinstance(layer, nn.Linear) else weight.flatten(2)
    for left, right in steps:
        W = torch.einsum("po,oik,ij->pjk", left, W, right)
    with torch.no_grad():
        result.weight.copy_(W.reshape(weight.shape))
    return result


def projector(Q: Tensor, kept: Tensor) -> Tensor:
    return Q[:, kept] @ Q[:, kept].T


@few
@given(layers, st.booleans(), st.data())
def test_a_bottleneck_computes_the_layer_without_directions(case: Case, by_patch: bool, data: st.DataObject) -> None:
    layer, a, _ = case
    whole = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    basis = basis_of(whole, seed=7)
    inputs, outputs = (some_of(d, data.draw) for d in whole.present)
    module = whole.without(basis, inputs, outputs).module()
    expected = projected(layer, by_patch, (projector(basis.Q_G, outputs), projector(basis.Q_A, inputs)))
    assert torch.allclose(module(a), expected(a), atol=1e-10)
    assert all(type(part) in (nn.Linear, nn.Conv2d, nn.Sequential) for part in module.modules())


@few
@given(layers, st.booleans(), st.data())
def test_bases_are_merged_when_a_core_is_decomposed_again(case: Case, by_patch: bool, data: st.DataObject) -> None:
    layer, a, _ = case
    present = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    original = present.original
    left, right = torch.eye(original[1]).double(), torch.eye(original[0]).double()
    for seed in range(3):
        basis = basis_of(present, seed)
        inputs, outputs = (some_of(d, data.draw) for d in present.present)
        # Q stays as it is on a side that keeps everything, so that this side is the identity there.
        left = left if len(outputs) == present.present[1] else left @ basis.Q_G[:, outputs]
        right = right if len(inputs) == present.present[0] else right @ basis.Q_A[:, inputs]
        present = present.without(basis, inputs, outputs)
        assert present.original == original
        assert present.present == (right.shape[1], left.shape[1])
    module = present.module()
    expected = projected(layer, by_patch, (left @ left.T, right @ right.T))
    assert torch.allclose(module(a), expected(a), atol=1e-10)
    parts = [part for part in module.modules() if not isinstance(part, nn.Sequential)]
    assert len(parts) <= 3
    for part, across in ((present.project, False), (present.restore, True)):
        if part is not None:
            Q = part.weight.detach().flatten(1)
            gram = Q.T @ Q if across else Q @ Q.T
            assert torch.allclose(gram, torch.eye(len(gram)).double(), atol=1e-10)


@few
@given(layers, st.booleans(), st.data())
def test_directions_that_carry_nothing_go_without_any_change(case: Case, by_patch: bool, data: st.DataObject) -> None:
    layer, a, _ = case
    whole = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    basis = basis_of(whole, seed=3)
    inputs, outputs = (some_of(d, data.draw) for d in whole.present)
    low = projected(layer, by_patch, (projector(basis.Q_G, outputs), projector(basis.Q_A, inputs)))
    module = RotatedLayer(low, by_patch=by_patch).without(basis, inputs, outputs).module()  # type: ignore[arg-type]
    assert torch.allclose(module(a), low(a), atol=1e-10)


@few
@given(layers, st.booleans())
def test_with_nothing_removed_the_layer_is_the_same_bit_for_bit(case: Case, by_patch: bool) -> None:
    layer, a, _ = case
    whole = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    d_in, d_out = whole.present
    module = whole.without(basis_of(whole, 0), torch.arange(d_in), torch.arange(d_out)).module()
    assert type(module) is type(layer)
    assert torch.equal(module(a), layer(a))


def test_mode_and_frozen_weights_are_passed_on_and_the_bias_is_the_same_parameter() -> None:
    conv = nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
    layer = RotatedLayer(conv)
    there = layer.without(Eigenbasis.trivial(3, 4), torch.arange(2), torch.arange(1))
    assert there.restore is not None
    assert there.restore.bias is conv.bias
    assert there.core.bias is None
    assert not any(p.requires_grad for p in there.module().parameters())
    assert not any(m.training for m in there.module().modules())
    again = layer.without(Eigenbasis.trivial(3, 4), torch.arange(2), torch.arange(4))
    assert again.core.bias is conv.bias


# ---------------------------------------------------------------- what it costs


def macs(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // (2 * len(x))


@few
@given(layers, st.booleans(), st.data())
def test_costs_are_the_parameters_and_multiplications_of_the_real_module(
    case: Case, by_patch: bool, data: st.DataObject
) -> None:
    layer, a, _ = case
    conv = isinstance(layer, nn.Conv2d)
    if conv:
        layer.padding_mode = "zeros"  # the counter sees padding of other kinds as part of the input
        layer._reversed_padding_repeated_twice = [0, 0, 0, 0]  # type: ignore[assignment]
    each = Positions(a[0, 0].numel() if conv else a[0, ..., 0].numel(), layer(a)[0].numel() / len(layer.weight))
    present = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    for seed in range(2):
        inputs, outputs = (some_of(d, data.draw) for d in present.present)
        there = present.without(basis_of(present, seed), inputs, outputs)
        biases = 0 if layer.bias is None else len(layer.bias)
        ranks = len(inputs), len(outputs)
        parameters = sum(p.numel() for p in there.module().parameters()) - biases
        assert present.cost(*ranks, Positions(1, 1)) == parameters
        assert present.cost(*ranks, each) == macs(there.module(), a)
        if present.reads_patches and there.project is not None:
            each = Positions(each.outputs, each.outputs)
        present = there


@few
@given(layers, st.booleans(), st.data())
def test_the_cheapest_form_that_keeps_what_is_needed_is_taken(case: Case, by_patch: bool, data: st.DataObject) -> None:
    layer, *_ = case
    whole = RotatedLayer(layer, by_patch=by_patch)  # type: ignore[arg-type]
    needed = [len(some_of(d, data.draw)) for d in whole.present]
    each = Positions(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    ranks = whole.cheapest(*needed, each)
    forms = list(itertools.product(*({d, n} for d, n in zip(whole.present, needed, strict=True))))
    assert ranks in forms
    assert whole.cost(*ranks, each) == min(whole.cost(*form, each) for form in forms)


def test_a_projection_that_does_not_pay_is_not_made() -> None:
    layer = RotatedLayer(nn.Linear(10, 10))
    assert layer.cheapest(6, 6, Positions(1, 1)) == (10, 10)  # 60 + 36 + 60 > 100
    assert layer.cheapest(9, 4, Positions(1, 1)) == (10, 4)  # 40 + 40 against 90 + 36 + 40
    assert layer.cheapest(3, 3, Positions(1, 1)) == (10, 3)  # 30 + 30 against 30 + 9 + 30
    wide = RotatedLayer(nn.Conv2d(10, 10, 3))
    assert wide.cheapest(3, 3, Positions(1, 1)) == (3, 3)  # 30 + 81 + 30 against 900
    strided = RotatedLayer(nn.Conv2d(10, 10, 3, stride=2))
    assert strided.cheapest(5, 10, Positions(400, 1)) == (10, 10)  # the projection reads at every pixel


@pytest.mark.parametrize("by_patch", [False, True])
def test_a_projection_onto_the_input_of_a_pointwise_convolution_takes_its_stride(by_patch: bool) -> None:
    layer = RotatedLayer(nn.Conv2d(4, 4, 1, stride=2), by_patch=by_patch)
    there = layer.without(Eigenbasis.trivial(4, 4), torch.arange(2), torch.arange(4))
    assert there.project is not None
    assert (there.project.stride, there.core.stride) == ((2, 2), (1, 1))
