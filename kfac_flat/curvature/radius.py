"""The spectral radius of a layer's Kronecker block, and the eigenvectors that make it cheap to differentiate.

rho_l = lambda_max(A_l) lambda_max(G_l)  [HGNP eq. 1-4]. With its unit eigenvectors held fixed

    lambda_A = 1/N sum_nt (a_nt . v_A)^2,      lambda_G = 1/(N T) sum_nt (g_nt . v_G)^2

are differentiable functions of the weights whose gradient is that of the eigenvalues wherever these are simple
(Hellmann-Feynman). Neither A nor G is needed: two projections give the values, and a projection followed by its
adjoint is one step of power iteration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_flat.curvature.kronecker import top_eigenpair
from kfac_flat.curvature.layers import (
    Layer,
    groups_of,
    input_dim,
    input_factor,
    inputs_per_channel,
    output_dim,
    output_factor,
    output_gradients,
    project_input,
)
from kfac_flat.structure import Kept


@dataclass(frozen=True)
class Eigenvectors:
    """Estimates of the top eigenvectors of a layer's factors, of unit length.

    Attributes:
        A: ``[groups, d_in]``.
        G: ``[groups, d_out]``.
    """

    A: Tensor
    G: Tensor

    @classmethod
    def random(cls, layer: Layer, generator: torch.Generator) -> Eigenvectors:
        """Draw starting vectors on the CPU, so that every device starts alike, and move them to the layer's."""
        weight = layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, G = (
            torch.randn(groups_of(layer), size, generator=generator, dtype=torch.float64).to(weight.device, dtype)
            for size in (input_dim(layer), output_dim(layer))
        )
        return cls(_unit(A), _unit(G))

    def fits(self, layer: Layer) -> bool:
        """Tell whether the shapes are the layer's."""
        groups = groups_of(layer)
        return self.A.shape == (groups, input_dim(layer)) and self.G.shape == (groups, output_dim(layer))

    def to(self, like: Tensor) -> Eigenvectors:
        """Return them on the device and in the dtype of ``like``."""
        return Eigenvectors(self.A.to(like), self.G.to(like))

    def towards(self, A_v: Tensor, G_v: Tensor) -> Eigenvectors:
        """Return the result of a power step, of unit length; what has no direction stays as it is.

        Args:
            A_v: What :func:`factors_times` made of A, ``[groups, d_in]``.
            G_v: What it made of G, ``[groups, d_out]``.
        """
        return Eigenvectors(_unit(A_v, otherwise=self.A), _unit(G_v, otherwise=self.G))

    def index_select(self, layer: Layer, kept: Kept) -> Eigenvectors:
        """Return what a cut leaves of them, of unit length; ``layer`` is the layer BEFORE the cut."""
        inputs, outputs = kept.inputs.to(self.A.device), kept.outputs.to(self.A.device)
        per_channel = inputs_per_channel(layer)
        groups = len(inputs) if layer.weight.shape[1] == 1 and groups_of(layer) > 1 else groups_of(layer)  # depthwise
        A = self.A.reshape(-1, per_channel).index_select(0, inputs).reshape(groups, -1)
        G = self.G.reshape(-1).index_select(0, outputs).reshape(groups, -1)
        return Eigenvectors(_unit(A), _unit(G))

    def joined_to(self, left: Eigenvectors, layer: Layer, kept: Kept) -> Eigenvectors:
        """Return what they become when the channels that a cut took come back: the inverse of :meth:`index_select`.

        What was kept points where ``left`` points now, with the share of the length that it had.
        """
        cut = self.index_select(layer, kept)
        if torch.equal(cut.A, left.A) and torch.equal(cut.G, left.G):
            return self
        return Eigenvectors(
            _joined(self.A, left.A.to(self.A), kept.inputs, inputs_per_channel(layer)),
            _joined(self.G, left.G.to(self.G), kept.outputs, 1),
        )


def _joined(whole: Tensor, left: Tensor, kept: Tensor, per_channel: int) -> Tensor:
    """Put ``left`` in the place of the kept channels, group by group as long as these are."""
    rows = whole.reshape(-1, per_channel).clone()
    kept = kept.to(rows.device)
    lengths = rows[kept].reshape(left.shape).norm(dim=1, keepdim=True)
    rows[kept] = (left * lengths).reshape(-1, per_channel)
    return rows.reshape(whole.shape)


@dataclass(frozen=True)
class LayerData:
    """What one pass over a batch shows of a layer.

    Attributes:
        layer: The layer.
        a: Its input, ``[N, ...]``.
        g: The per-example loss gradient at its output (the gradient of the SUM of the example losses), ``[N, ...]``.
        examples: N, where the first axis of ``a`` is something else: time, windows of an image, all words of a batch.
    """

    layer: Layer
    a: Tensor
    g: Tensor
    examples: int | None = None

    @property
    def batch_size(self) -> int:
        """Number of examples, N."""
        return self.examples or len(self.a)

    def detach(self) -> LayerData:
        """Return the same numbers without their graph."""
        return replace(self, a=self.a.detach(), g=self.g.detach())

    def to_working_precision(self) -> LayerData:
        """Return the data in the weight's dtype, at least float32: squares of half-precision gradients underflow."""
        dtype = torch.promote_types(self.layer.weight.dtype, torch.float32)
        return replace(self, a=self.a.to(dtype), g=self.g.to(dtype))


def eigenvalues(data: LayerData, v: Eigenvectors) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients v_A^T A v_A and v_G^T G v_G, ``[groups]`` each, differentiable in ``a`` and ``g``.

    They are the top eigenvalues when ``v`` holds the top eigenvectors, and below them otherwise. Their product is the
    radius of each of the layer's blocks; rho_l is the largest.
    """
    along_a = project_input(data.layer, data.a, v.A)
    along_g = torch.einsum("ngct,gc->ngt", output_gradients(data.layer, data.g), v.G)
    lambda_A = along_a.square().sum((0, 2)) / data.batch_size
    lambda_G = along_g.square().mean((0, 2))
    return lambda_A, lambda_G


def product_rule(of_batch: tuple[Tensor, Tensor], at: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar whose gradient is that of rho_l: lambda_G grad lambda_A + lambda_A grad lambda_G.

    Written so that the gradients may stem from one part of a batch and the eigenvalues from all of it: averaged over
    the parts, the gradient is that of the whole.

    Args:
        of_batch: What :func:`eigenvalues` returned, with its graph.
        at: The eigenvalues themselves, without one.
    """
    lambda_A, lambda_G = at
    share = _attaining(lambda_A * lambda_G)
    return (share * (lambda_G * of_batch[0] + lambda_A * of_batch[1])).sum()


def factors_times(data: LayerData, v: Eigenvectors) -> tuple[Tensor, Tensor]:
    """A v_A, ``[groups, d_in]``, and G v_G, ``[groups, d_out]``, on this batch, without forming A or G.

    A v is the adjoint of the projection applied to the projection, which autograd supplies: for a convolution the
    weight gradient of a kernel with one output channel per group, about 2 / C_out of the layer's own forward.
    """
    data = data.detach()
    with torch.enable_grad():
        v_A = v.A.detach().requires_grad_()
        along_a = project_input(data.layer, data.a, v_A)
        (A_v,) = torch.autograd.grad(along_a, v_A, along_a.detach())
    gradients = output_gradients(data.layer, data.g)
    along_g = torch.einsum("ngct,gc->ngt", gradients, v.G)
    G_v = torch.einsum("ngct,ngt->gc", gradients, along_g)
    return A_v / data.batch_size, G_v / (len(along_g) * along_g.shape[-1])


def factors(data: LayerData) -> tuple[Tensor, Tensor]:
    """Form A, ``[groups, d_in, d_in]``, and G, ``[groups, d_out, d_out]``: for tests and small nets."""
    data = data.detach()
    return input_factor(data.layer, data.a) * (len(data.a) / data.batch_size), output_factor(data.layer, data.g)


def top_eigenvectors(A: Tensor, G: Tensor) -> Eigenvectors:
    """Decompose the factors that :func:`factors` formed, O(d^3)."""
    # Decompositions fail on what is not finite; without it any vectors do, since rho is not finite either.
    A, G = (torch.where(f.isfinite().all(), f, torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)) for f in (A, G))
    return Eigenvectors(top_eigenpair(A)[1], top_eigenpair(G)[1])


def input_mask_gradient(layer: Layer, radii: Tensor, v: Eigenvectors) -> Tensor:
    """D rho_l / d m at m = 1 through A alone, m a mask on the layer's input channels.

    A_ij is proportional to m_i m_j, so d rho / d m_i = 2 rho v_A,i^2, summed over the entries of ``a`` that stem from
    channel i [HGNP eq. 5-6]; only the group that attains rho_l depends on its mask.

    Args:
        layer: The layer.
        radii: Radius of each of its blocks, ``[groups]``.
        v: Its eigenvectors.

    Returns:
        ``[C_in]``, without a graph.
    """
    per_entry = 2 * (radii * _attaining(radii))[:, None] * v.A.square()
    return per_entry.reshape(-1, inputs_per_channel(layer)).sum(1)


def _attaining(radii: Tensor) -> Tensor:
    """Mark which of a layer's blocks attains its radius, ``[groups]``; those that are alike share it."""
    attains = (radii == radii.max()).to(radii)
    return attains / attains.sum()


def _unit(vectors: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Scale each row to unit length; rows that have no direction are taken from ``otherwise``, or made uniform."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    fallback = torch.full_like(vectors, vectors.shape[-1] ** -0.5) if otherwise is None else otherwise
    return torch.where(norm.isfinite() & (norm > 0), vectors / norm, fallback)
