"""Top eigenvalues of the true curvature of a network's loss, of all parameters or of some, by Lanczos iteration.

Nothing is approximated but the eigenvalue: products with the Hessian and with the Gauss-Newton matrix are computed by
differentiating twice [Pearlmutter 1994; Schraudolph 2002], on all examples at once and in the network's present mode,
so that what examples have to do with each other through BatchNorm is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]


class TrueCurvature:
    """Curvature of the mean cross entropy of a batch.

    Args:
        model: Maps images to logits ``[N, classes]``. Its BatchNorm statistics move if it is in training mode.
        images: ``[N, ...]``.
        labels: ``[N]``.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self._logits = model(images)
        self._loss = F.cross_entropy(self._logits, labels)

    def hessian(self, parameters: Sequence[Tensor]) -> Product:
        """Return v -> H v, H the Hessian of the loss with respect to these parameters, all in one vector."""
        gradients = torch.autograd.grad(self._loss, parameters, create_graph=True)

        def times(v: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(gradients, parameters, _like(v, parameters), retain_graph=True))

        return times

    def ggn(self, parameters: Sequence[Tensor]) -> Product:
        """Return v -> J^T L J v, J the derivative of the logits and L the Hessian of the loss at the logits."""
        p = self._logits.detach().softmax(1)
        anything = torch.zeros_like(self._logits, requires_grad=True)
        transposed = torch.autograd.grad(self._logits, parameters, anything, create_graph=True)  # linear in anything

        def times(v: Tensor) -> Tensor:
            (Jv,) = torch.autograd.grad(transposed, anything, _like(v, parameters), retain_graph=True)
            LJv = p * (Jv - (p * Jv).sum(1, keepdim=True)) / len(p)
            return _flat(torch.autograd.grad(self._logits, parameters, LJv, retain_graph=True))

        return times


def largest_eigenvalue(times: Product, start: Tensor, tolerance: float = 0.01, steps: int = 50) -> tuple[float, Tensor]:
    """Find the algebraically largest eigenvalue of a symmetric matrix by Lanczos iteration, all vectors orthogonalised.

    Args:
        times: Multiplies a vector by the matrix.
        start: A vector with a share of the eigenvector, of any length but zero.
        tolerance: Relative to the eigenvalue, how far from an exact one it may be: the norm of the residual.
        steps: Products at most.

    Returns:
        The eigenvalue, and a unit vector close to its eigenvector.

    Example:
        >>> matrix = torch.diag(torch.tensor([1.0, -5.0, 3.0]))
        >>> value, vector = largest_eigenvalue(lambda v: matrix @ v, torch.ones(3))
        >>> round(value, 4)
        3.0
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        product = times(basis[-1])
        diagonal.append(float(product @ basis[-1]))
        Q = torch.stack(basis)
        for _ in range(2):  # once leaves behind what rounding brings in
            product = product - Q.T @ (Q @ product)
        T = torch.tensor(diagonal, dtype=torch.float64).diag()
        if beside:
            sides = torch.tensor(beside, dtype=torch.float64)
            T += sides.diag(1) + sides.diag(-1)
        values, vectors = torch.linalg.eigh(T)
        value, left = float(values[-1]), float(product.norm())
        residual = left * abs(float(vectors[-1, -1]))
        done = residual <= tolerance * abs(value) or len(basis) in (steps, len(start))
        if done or left <= 1e-6 * float(values.abs().max()):
            return value, vectors[:, -1].to(Q) @ Q
        beside.append(left)
        basis.append(product / left)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _like(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into parts of the parameters' shapes."""
    parts = v.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
