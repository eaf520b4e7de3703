"""The Kronecker product of two covariances, A (x) G, without ever forming it.

K-FAC [Martens & Grosse 2015] approximates the curvature of a layer with weight W (d_out x d_in) by
A (x) G: A (d_in x d_in) the covariance of the layer's inputs, G (d_out x d_out) that of the loss
gradients at its outputs. Everything one wants to know of the large matrix follows from the small ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def top_eigenpair(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue and a unit eigenvector of a symmetric matrix, or of each in a batch of them.

    Args:
        matrix: ``[..., d, d]``, symmetric, floating point.

    Returns:
        The eigenvalue ``[...]`` and its eigenvector ``[..., d]``, both of the matrix's dtype.

    Example:
        >>> value, vector = top_eigenpair(torch.diag(torch.tensor([1.0, 3.0])))
        >>> value.item(), vector.abs().tolist()
        (3.0, [0.0, 1.0])
    """
    # In single precision, LAPACK does not always converge on factors of low rank, which are the rule here.
    values, vectors = torch.linalg.eigh(matrix.double())
    return values[..., -1].to(matrix.dtype), vectors[..., -1].to(matrix.dtype)


@dataclass(frozen=True)
class KroneckerProduct:
    """A (x) G as an operator on matrices V (d_out x d_in), the shape of the layer's weight.

    ``(A (x) G) vec(V) = vec(G V A)`` with vec stacking columns; A and G are symmetric positive semi-definite.

    Attributes:
        A: ``[d_in, d_in]``, covariance of the inputs.
        G: ``[d_out, d_out]``, covariance of the output gradients.

    Example:
        >>> block = KroneckerProduct(torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, 0.0])))
        >>> block.spectral_radius().item(), block.trace().item(), block.rank()
        (6.0, 9.0, 2)
    """

    A: Tensor
    G: Tensor

    def matvec(self, V: Tensor) -> Tensor:
        """Multiply the matrix ``V`` ``[d_out, d_in]``, read as a vector, by the block; same shape."""
        return self.G @ V @ self.A

    def spectral_radius(self) -> Tensor:
        """Return lambda_max(A) lambda_max(G), a scalar."""
        return top_eigenpair(self.A)[0] * top_eigenpair(self.G)[0]

    def top_eigenvector(self) -> Tensor:
        """Return the unit eigenvector v_A (x) v_G of the largest eigenvalue, as a matrix ``[d_out, d_in]``."""
        return torch.outer(top_eigenpair(self.G)[1], top_eigenpair(self.A)[1])

    def trace(self) -> Tensor:
        """Return tr A tr G, a scalar."""
        return self.A.trace() * self.G.trace()

    def rank(self) -> int:
        """Return rank A * rank G."""
        return int(torch.linalg.matrix_rank(self.A, hermitian=True) * torch.linalg.matrix_rank(self.G, hermitian=True))

    def dense(self) -> Tensor:
        """Return the matrix itself, ``[d_in * d_out, d_in * d_out]``, acting on column-stacked vec(V)."""
        return torch.kron(self.A, self.G)
