"""The Kronecker-factored eigenbasis, and layers that work in fewer of its directions [Wang et al., arXiv 1905.05934].

With the eigenvectors Q_A and Q_G of A and G, a layer's weight is W* = Q_G^T W Q_A in a basis in which the Fisher
A (x) G is diagonal: d_A d_G^T. There directions of the input (columns of W*) and of the output (rows) can be left out
one by one, without the cross terms that a removal in parameter coordinates has. What remains is a bottleneck

    x  ->  project (Q_A^T, kept columns)  ->  core (what is left of W*)  ->  restore (Q_G, kept rows; the bias)

Weights are written as ``[d_out, d_in, k]`` here. For a convolution in the basis of its channels, k counts the entries
of the kernel, which all share Q_A ``[C_in, C_in]``: A is taken to be A_channels (x) I_k. In the basis of its patches,
d_in is C_in times the kernel's area and k is 1, as it is for Linear.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from kfac_flat.curvature.kronecker import KroneckerProduct
from kfac_flat.curvature.layers import Layer, input_patches, inputs_per_channel, output_factor
from kfac_flat.curvature.radius import LayerData

PROJECT, CORE, RESTORE = "project", "core", "restore"
BASES = ("channels", "patches")


# ---------------------------------------------------------------- the basis


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors and eigenvalues of A and G, smallest first.

    Attributes:
        Q_A: ``[d_in, d_in]``, one eigenvector a column.
        d_A: ``[d_in]``.
        Q_G: ``[d_out, d_out]``.
        d_G: ``[d_out]``.

    Example:
        >>> basis = Eigenbasis.of(KroneckerProduct(torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[3.0]])))
        >>> basis.d_A, basis.importances(torch.tensor([[[5.0], [7.0]]]))
        (tensor([1., 2.]), (tensor([147., 150.]), tensor([297.])))
    """

    Q_A: Tensor
    d_A: Tensor  # noqa: N815
    Q_G: Tensor
    d_G: Tensor  # noqa: N815

    @classmethod
    def of(cls, block: KroneckerProduct) -> Eigenbasis:
        """Decompose the factors; eigenvalues that rounding has made negative are zero."""
        d_A, Q_A = torch.linalg.eigh(block.A)
        d_G, Q_G = torch.linalg.eigh(block.G)
        return cls(Q_A, d_A.clamp(min=0), Q_G, d_G.clamp(min=0))

    @classmethod
    def trivial(cls, d_in: int, d_out: int) -> Eigenbasis:
        """Return the basis that leaves everything where it is."""
        return cls(torch.eye(d_in), torch.ones(d_in), torch.eye(d_out), torch.ones(d_out))

    def rotate(self, W: Tensor) -> Tensor:
        """Compute W* = Q_G^T W Q_A for each entry of the kernel, ``[d_out, d_in, k]``."""
        return torch.einsum("op,oik,ij->pjk", self.Q_G, W, self.Q_A)

    def importances(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Twice the rise of the loss when an input or an output direction goes: the Fisher's quadratic form of it.

        Args:
            W: ``[d_out, d_in, k]``.

        Returns:
            ``[d_in]`` and ``[d_out]``.
        """
        each = torch.einsum("pjk,pjk,p,j->pj", (rotated := self.rotate(W)), rotated, self.d_G, self.d_A)
        return each.sum(0), each.sum(1)


def channel_input_factor(data: LayerData) -> Tensor:
    """Form A_channels ``[C_in, C_in]``, the mean of the blocks of A that belong to one entry of the kernel each."""
    k = inputs_per_channel(data.layer)
    patches = rearrange(input_patches(data.layer, data.a), "n 1 (c k) t -> n c (k t)", k=k)
    return torch.einsum("nit,njt->ij", patches, patches) / (len(patches) * k)


def channel_factors(data: LayerData) -> tuple[Tensor, Tensor]:
    """Form A_channels and G of an ungrouped layer."""
    return channel_input_factor(data), output_factor(data.layer, data.g)[0]


# ---------------------------------------------------------------- layers in it


@dataclass(frozen=True)
class Positions:
    """How often a layer's weight is applied for one example: where it reads, and where it writes."""

    inputs: float
    outputs: float


@dataclass(frozen=True)
class RotatedLayer:
    """A layer, or the bottleneck that has taken its place.

    Attributes:
        core: The layer itself, or what is left of it.
        project: What comes before it; None while it reads all directions.
        restore: What comes after it; None while it writes all directions.
        by_patch: Whether a convolution's input directions are those of its patches; otherwise of its channels.
    """

    core: Layer
    project: Layer | None = None
    restore: Layer | None = None
    by_patch: bool = False

    def module(self) -> nn.Module:
        """Return what stands in the model: the layer itself, or a sequence of two or three plain layers."""
        parts = {PROJECT: self.project, CORE: self.core, RESTORE: self.restore}
        present = OrderedDict[str, nn.Module]((name, part) for name, part in parts.items() if part is not None)
        return self.core if len(present) == 1 else nn.Sequential(present).train(self.core.training)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights and the bias by the name that they have below the layer's own."""
        return dict(self.module().named_parameters())

    @property
    def reads_patches(self) -> bool:
        """Whether the geometry of a convolution is that of the projection once there is one.

        It is for a kernel of one entry in any case: the projection then skips what the stride skips.
        """
        return self.by_patch or inputs_per_channel(self.core) == 1

    def weight(self) -> Tensor:
        """View the core's weight as ``[d_out, d_in, k]``; float64, without a graph."""
        weight = self.core.weight.detach().double()
        if self.reads_patches:
            return rearrange(weight, "o ... -> o (...) 1")
        return rearrange(weight, "o i h w -> o i (h w)")

    @property
    def present(self) -> tuple[int, int]:
        """Directions that the core reads and writes."""
        W = self.weight()
        return W.shape[1], W.shape[0]

    @property
    def original(self) -> tuple[int, int]:
        """Directions that the layer once read and wrote."""
        d_in, d_out = self.present
        d_in = d_in if self.project is None else self.project.weight[0].numel()
        return d_in, d_out if self.restore is None else len(self.restore.weight)

    def cost(self, d_in: int, d_out: int, each: Positions) -> float:
        """What the layer costs with so many directions left, if one weight costs as many as it has positions.

        A side that has all its directions needs no projection. With positions of 1 this counts parameters, the bias
        not among them; with those of the data, multiply-accumulates.
        """
        (before, after), k = self.original, self.weight().shape[2]
        project = before * d_in * (each.outputs if self.reads_patches else each.inputs) if d_in < before else 0
        restore = d_out * after * each.outputs if d_out < after else 0
        return project + d_in * d_out * k * each.outputs + restore

    def cheapest(self, d_in: int, d_out: int, each: Positions) -> tuple[int, int]:
        """Return how many directions to keep so that the layer is cheapest, if these are all that need to be kept.

        A projection that costs more than it saves is not made: the directions of its side all stay.
        """
        all_in, all_out = self.present
        ranks = [(all_in, all_out), (all_in, d_out), (d_in, all_out), (d_in, d_out)]
        return min(ranks, key=lambda rank: self.cost(rank[0], rank[1], each))  # of equals the first, which keeps most

    def without(self, basis: Eigenbasis, inputs: Tensor, outputs: Tensor) -> RotatedLayer:
        """Return the layer with only these directions of the basis left; a side that keeps all of them is not rotated.

        Projections that are there already take the new rotation up, so that there are never more than two.

        Args:
            basis: Of the core.
            inputs: Kept columns of W*, ascending, ``int64``.
            outputs: Kept rows of it.
        """
        W, (d_in, d_out), bias = self.weight(), self.present, (self.restore or self.core).bias
        geometry, pointwise, project, restore = self.core, isinstance(self.core, nn.Linear), self.project, self.restore
        if len(inputs) < d_in:
            Q = basis.Q_A[:, inputs].to(W)
            W = torch.einsum("oik,ij->ojk", W, Q)
            if project is not None:
                project = _like(project, Q.T @ project.weight.detach().double().flatten(1), None)
            elif self.reads_patches:
                project, pointwise = _like(self.core, Q.T, None), True
            else:
                project = _like(self.core, Q.T, None, pointwise=True)
        if len(outputs) < d_out:
            Q = basis.Q_G[:, outputs].to(W)
            W = torch.einsum("oik,op->pik", W, Q)
            back = Q if restore is None else restore.weight.detach().double().flatten(1) @ Q
            restore = _like(self.core, back, bias, pointwise=True)
        core = _like(geometry, W.flatten(1), None if restore else bias, pointwise=pointwise)
        return RotatedLayer(core, project, restore, self.by_patch)


def _like(layer: Layer, weight: Tensor, bias: Tensor | None, *, pointwise: bool = False) -> Layer:
    """Make a layer of the same kind with another weight ``[d_out, d_in]``, given row by row, and this very bias.

    Args:
        layer: Whose geometry, mode, device and dtype it has.
        weight: Its weight.
        bias: Its bias.
        pointwise: Whether a convolution has a kernel of one entry instead of the layer's geometry.
    """
    new: Layer
    if isinstance(layer, nn.Linear):
        new = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    else:
        kernel = (1, 1) if pointwise else layer.kernel_size
        weight = rearrange(weight, "o (i h w) -> o i h w", h=kernel[0], w=kernel[1])
        geometry = {} if pointwise else {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        mode = "zeros" if pointwise else layer.padding_mode
        new = nn.Conv2d(weight.shape[1], len(weight), kernel, bias=False, padding_mode=mode, device="meta", **geometry)  # type: ignore[arg-type]
    new.weight = nn.Parameter(weight.to(layer.weight).contiguous(), layer.weight.requires_grad)
    new.bias = bias
    return new.train(layer.training)
