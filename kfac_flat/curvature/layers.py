"""How Linear and Conv2d read their input and meet their output: all that the Kronecker factors need to know.

Shapes, for a batch of N examples and T output positions (T = 1 for a Linear on ``[N, d]``, the sequence length on
``[N, T, d]``, the output pixels of a convolution [Grosse & Martens 2016]):

    A = 1/N     sum_nt a_nt a_nt^T      a_nt: what the weight's rows are multiplied with (for a convolution, a patch)
    G = 1/(N T) sum_nt g_nt g_nt^T      g_nt: gradient of example n's loss at output position t

A grouped convolution is exactly that many convolutions side by side, so it has one pair of factors per group, and
every tensor here carries a leading axis of groups (1 for everything else).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

Layer: TypeAlias = "nn.Linear | nn.Conv2d"
LAYER_TYPES = (nn.Linear, nn.Conv2d)


def is_layer(module: nn.Module) -> bool:
    """Tell whether the module computes what Linear or Conv2d do: it is one, or a subclass that keeps its forward."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in LAYER_TYPES)


def groups_of(layer: Layer) -> int:
    """Number of independent Kronecker blocks of the layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def input_dim(layer: Layer) -> int:
    """Size of A, d_in: the numbers that one row of the weight is multiplied with."""
    return layer.weight[0].numel()


def output_dim(layer: Layer) -> int:
    """Size of G, d_out per group."""
    return layer.weight.shape[0] // groups_of(layer)


def inputs_per_channel(layer: Layer) -> int:
    """How many entries of ``a`` stem from one input channel: the kernel's area, or 1."""
    return layer.weight[0, 0].numel()


def project_input(layer: Layer, a: Tensor, v: Tensor) -> Tensor:
    """Compute a_nt . v for every example and position without forming the a_nt of a convolution.

    For Conv2d the result is itself a convolution, with one output channel per group and v as its kernel.

    Args:
        layer: The layer that reads ``a``.
        a: Its input, ``[N, ..., d_in]`` or ``[N, C_in, H, W]``.
        v: One vector per group, ``[groups, d_in]``.

    Returns:
        ``[N, groups, T]``, differentiable in ``a`` and ``v``.
    """
    if isinstance(layer, nn.Conv2d):
        kernel = v.reshape(layer.groups, *layer.weight.shape[1:])
        a, padding = _padded(layer, a)
        return F.conv2d(a, kernel, None, layer.stride, padding, layer.dilation, layer.groups).flatten(2)
    return rearrange(a @ v.squeeze(0), "n ... -> n 1 (...)")


def output_gradients(layer: Layer, g: Tensor) -> Tensor:
    """View the gradient at the layer's output as ``[N, groups, d_out, T]``."""
    if isinstance(layer, nn.Conv2d):
        return rearrange(g, "n (groups c) h w -> n groups c (h w)", groups=layer.groups)
    return rearrange(g, "n ... c -> n 1 c (...)")


def input_patches(layer: Layer, a: Tensor) -> Tensor:
    """View the input as what the weight's rows are multiplied with, ``[N, groups, d_in, T]``: unfolded patches."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        unfolded = F.unfold(_pad(layer, a, mode), layer.kernel_size, layer.dilation, 0, layer.stride)
        return rearrange(unfolded, "n (groups d) t -> n groups d t", groups=layer.groups)
    return rearrange(a, "n ... d -> n 1 d (...)")


def input_factor(layer: Layer, a: Tensor) -> Tensor:
    """Form A, ``[groups, d_in, d_in]``, by unfolding: for small layers and as a reference, never on the hot path."""
    patches = input_patches(layer, a)
    return torch.einsum("ngit,ngjt->gij", patches, patches) / len(a)


def output_factor(layer: Layer, g: Tensor) -> Tensor:
    """Form G, ``[groups, d_out, d_out]``, from per-example gradients."""
    gradients = output_gradients(layer, g)
    n, _, _, positions = gradients.shape
    return torch.einsum("ngit,ngjt->gij", gradients, gradients) / (n * positions)


def _padded(layer: nn.Conv2d, a: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """Apply padding that a convolution cannot do itself (reflect, replicate, circular); the rest is left to it."""
    if layer.padding_mode == "zeros":
        return a, layer.padding
    return _pad(layer, a, layer.padding_mode), (0, 0)


def _pad(layer: nn.Conv2d, a: Tensor, mode: str) -> Tensor:
    """Pad explicitly by what the layer's padding, a number or a word, comes to on each side."""
    if layer.padding == "valid":
        return a
    widths: list[int] = []
    for axis in (1, 0):  # F.pad counts from the last axis
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [int(layer.padding[axis])] * 2
    return F.pad(a, widths, mode=mode)
