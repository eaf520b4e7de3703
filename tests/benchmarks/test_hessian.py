"""benchmarks.hessian: products and eigenvalues against matrices that are written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.hessian import TrueCurvature, largest_eigenvalue
from tests.reference import Residual, batch, seeded

NAMES = [["conv.weight"], ["head.weight", "bn1.weight", "stem.bias"]]


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """Smooth nowhere and with BatchNorm in training mode, so that nothing about the Hessian is simple."""
    return seeded(Residual).train(), *batch(5, 2, 4, 4)


def outputs_of(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, object]:
    """All parameters named in one vector, and the logits as a function of it."""
    parameters = dict(model.named_parameters())
    sizes = [parameters[name].numel() for name in names]
    flat = torch.cat([parameters[name].detach().flatten() for name in names])

    def logits(vector: Tensor) -> Tensor:
        parts = zip(names, vector.split(sizes), strict=True)
        own = {name: part.view_as(parameters[name]) for name, part in parts}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, own | buffers, (x,))

    return flat, logits


@pytest.mark.parametrize("names", NAMES)
def test_products_are_those_with_the_hessian_and_the_gauss_newton_matrix(names: list[str]) -> None:
    model, x, y = network()
    flat, logits = outputs_of(model, names, x)
    hessian = torch.autograd.functional.hessian(lambda v: F.cross_entropy(logits(v), y), flat)
    J = torch.autograd.functional.jacobian(logits, flat)
    at_logits = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), logits(flat))
    ggn = torch.einsum("nkp,nkmj,mjq->pq", J, at_logits, J)
    curvature = TrueCurvature(model, x, y)
    parameters = [model.get_parameter(name) for name in names]
    v = batch(len(flat), 1)[0].flatten()
    assert torch.allclose(curvature.hessian(parameters)(v), hessian @ v, rtol=1e-8, atol=1e-12)
    assert torch.allclose(curvature.ggn(parameters)(v), ggn @ v, rtol=1e-8, atol=1e-12)
    assert not torch.allclose(hessian @ v, ggn @ v, rtol=0.01)


@given(st.integers(0, 2**20), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_lanczos_finds_the_largest_eigenvalue_of_an_indefinite_matrix(seed: int, size: int) -> None:
    matrix, start = batch(size, size, seed=seed)[0], batch(size, 1, seed=seed + 1)[0].flatten()
    matrix = matrix + matrix.T - 3 * torch.eye(size, dtype=matrix.dtype)
    value, vector = largest_eigenvalue(lambda v: matrix @ v, start, tolerance=1e-6)
    exact = float(torch.linalg.eigvalsh(matrix)[-1])
    assert value == pytest.approx(exact, rel=1e-5, abs=1e-9)
    assert torch.allclose(matrix @ vector, exact * vector, atol=1e-4)
    assert float(vector.norm()) == pytest.approx(1)


def test_a_rough_answer_takes_fewer_products_and_keeps_within_its_tolerance() -> None:
    values = torch.linspace(0, 1, 200, dtype=torch.float64) ** 4
    counts = {}
    for tolerance in (0.1, 1e-6):
        products: list[Tensor] = []

        def times(v: Tensor, products: list[Tensor] = products) -> Tensor:
            products.append(v)
            return values * v

        value, _ = largest_eigenvalue(times, torch.ones(200, dtype=torch.float64), tolerance)
        assert 1 - tolerance <= value <= 1 + 1e-9
        counts[tolerance] = len(products)
    assert counts[0.1] < counts[1e-6] < 50


def test_a_matrix_of_zeros_and_one_of_rank_one_end_at_once() -> None:
    u = torch.tensor([0.6, 0.0, 0.8])
    assert largest_eigenvalue(lambda v: 0 * v, torch.ones(3))[0] == 0
    value, vector = largest_eigenvalue(lambda v: 2 * u * (u @ v), torch.tensor([1.0, 1.0, 1.0]))
    assert value == pytest.approx(2, rel=1e-5)
    assert abs(float(vector @ u)) == pytest.approx(1, rel=1e-5)
