import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_flat.curvature.kronecker import KroneckerProduct, top_eigenpair

few = settings(max_examples=40, deadline=None)


def covariance(size: int, rank: int, scale: float, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with ``rank`` eigenvalues in [1, 2] * scale and otherwise zeros, and those eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.zeros(size, dtype=torch.float64)
    values[:rank] = scale * (1 + torch.rand(rank, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(values) @ basis.T
    return (0.5 * (matrix + matrix.T)).to(dtype), values


@st.composite
def products(draw: st.DrawFn) -> tuple[KroneckerProduct, Tensor, Tensor]:
    """A random A (x) G with the eigenvalues that its factors were made of."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    made = []
    for _ in range(2):
        size = draw(st.integers(1, 6))
        rank = draw(st.integers(0, size))
        scale = 10.0 ** draw(st.integers(-6, 6))
        made.append(covariance(size, rank, scale, dtype, draw(st.integers(0, 2**20))))
    (A, of_A), (G, of_G) = made
    return KroneckerProduct(A, G), of_A, of_G


def tolerance(product: KroneckerProduct) -> float:
    return 100 * torch.finfo(product.A.dtype).eps


def explicit(product: KroneckerProduct) -> np.ndarray:
    """The large matrix in float64, by numpy."""
    return np.kron(product.A.double().numpy(), product.G.double().numpy())


@few
@given(products())
def test_largest_eigenvalue_is_the_product_of_the_factors(made: tuple[KroneckerProduct, Tensor, Tensor]) -> None:
    product, of_A, of_G = made
    expected = np.linalg.eigvalsh(explicit(product))[-1]
    bound = tolerance(product) * float(of_A.max() * of_G.max())
    assert abs(float(product.spectral_radius()) - expected) <= bound
    assert abs(float(product.spectral_radius()) - float(of_A.max() * of_G.max())) <= bound


@few
@given(products())
def test_top_eigenvector_solves_the_eigenvalue_equation(made: tuple[KroneckerProduct, Tensor, Tensor]) -> None:
    product, of_A, of_G = made
    vector = product.top_eigenvector()
    assert vector.shape == (len(product.G), len(product.A))
    stacked = vector.double().numpy().flatten(order="F")
    largest = float(of_A.max() * of_G.max())
    assert abs(np.linalg.norm(stacked) - 1) <= tolerance(product)
    residual = explicit(product) @ stacked - largest * stacked
    assert np.linalg.norm(residual) <= tolerance(product) * largest


@few
@given(products())
def test_trace_is_the_product_of_traces(made: tuple[KroneckerProduct, Tensor, Tensor]) -> None:
    product, of_A, of_G = made
    expected = np.trace(explicit(product))
    assert abs(float(product.trace()) - expected) <= tolerance(product) * float(of_A.sum() * of_G.sum())


@settings(max_examples=100, deadline=None)
@given(products())
def test_rank_is_the_product_of_ranks(made: tuple[KroneckerProduct, Tensor, Tensor]) -> None:
    product, of_A, of_G = made
    assert product.rank() == int((of_A > 0).sum()) * int((of_G > 0).sum())


@few
@given(products(), st.integers(0, 2**20))
def test_matvec_is_the_dense_matrix_on_stacked_columns(
    made: tuple[KroneckerProduct, Tensor, Tensor], seed: int
) -> None:
    product, of_A, of_G = made
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(len(product.G), len(product.A), generator=generator, dtype=torch.float64).to(product.A.dtype)
    expected = explicit(product) @ V.double().numpy().flatten(order="F")
    bound = tolerance(product) * float(of_A.max() * of_G.max() * V.double().norm())
    seen = product.matvec(V)
    assert seen.shape == V.shape
    assert np.linalg.norm(seen.double().numpy().flatten(order="F") - expected) <= bound
    by_dense = product.dense() @ V.T.reshape(-1)  # rows of the transpose: columns stacked
    assert np.linalg.norm(by_dense.double().numpy() - expected) <= bound


@few
@given(products())
def test_results_keep_the_dtype(made: tuple[KroneckerProduct, Tensor, Tensor]) -> None:
    product, _, _ = made
    results = product.spectral_radius(), product.trace(), product.top_eigenvector(), product.dense()
    assert {r.dtype for r in results} == {product.A.dtype}


@few
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**20))
def test_top_eigenpair_of_a_batch_is_that_of_each_matrix(size: int, count: int, seed: int) -> None:
    matrices = [covariance(size, size, 1.0, torch.float64, seed + i)[0] for i in range(count)]
    values, vectors = top_eigenpair(torch.stack(matrices))
    for matrix, value, vector in zip(matrices, values, vectors, strict=True):
        assert abs(float(value) - np.linalg.eigvalsh(matrix.numpy())[-1]) <= 1e-13
        assert (matrix @ vector - value * vector).norm() <= 1e-13
        assert abs(float(vector.norm()) - 1) <= 1e-13


@pytest.mark.parametrize("scale", [1.0, 1e-10, 1e-17])
def test_top_eigenpairs_of_large_matrices_of_low_rank_are_found_in_single_precision(scale: float) -> None:
    """Repeated zeros keep LAPACK's own single precision from converging about once in ten of these."""
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 1, 1, 2, 3, 4, 5, 6, 7, 8):
        x = scale * torch.randn(rank, 320, generator=generator) * (torch.rand(320, generator=generator) < 0.5)
        matrix = (x.T @ x) / rank
        value, vector = top_eigenpair(matrix)
        expected = torch.linalg.svdvals(x.double())[0] ** 2 / rank
        assert value.dtype == vector.dtype == torch.float32
        assert torch.isclose(value.double(), expected, rtol=1e-5, atol=0)
        assert torch.allclose(
            matrix.double() @ vector.double(), expected * vector.double(), rtol=0, atol=1e-5 * expected
        )
