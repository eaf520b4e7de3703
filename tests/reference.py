"""The method once more, written the slow and obvious way, and small networks to try it on.

Nothing in here uses ``kfac_flat``: patches are found by index arithmetic, factors are sums of outer products over
examples and positions, rho is what ``eigvalsh`` says, and its gradient is what autograd says.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Any], Tensor]

torch.set_num_threads(1)  # tensors of a few numbers: threads only wait for one another, a hundredfold on a busy machine


# -------------------------------------------------------------------------------------------------- factors


def groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def source(i: int, size: int, mode: str) -> int | None:
    """Where coordinate ``i`` of a padded axis reads in the unpadded one; None: nowhere, it is a zero."""
    if 0 <= i < size:
        return i
    if mode == "zeros":
        return None
    if mode == "circular":
        return i % size
    if mode == "replicate":
        return min(max(i, 0), size - 1)
    return -i if i < 0 else 2 * (size - 1) - i  # reflect


def paddings(conv: nn.Conv2d) -> list[tuple[int, int]]:
    """(before, after) for rows and columns."""
    if conv.padding == "valid":
        return [(0, 0), (0, 0)]
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in conv.padding]


def patches(layer: nn.Module, a: Tensor) -> Tensor:
    """What the rows of the weight are multiplied with: ``[N, groups, T, d_in]``, differentiable in ``a``."""
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), 1, -1, a.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    n, channels, height, width = a.shape
    (top, bottom), (left, right) = paddings(layer)
    rows = range(-top, height + bottom - dh * (kh - 1), sh)
    columns = range(-left, width + right - dw * (kw - 1), sw)
    nothing = channels * height * width  # index of the zero that is appended below
    index = []
    for group in range(layer.groups):
        for y, x in itertools.product(rows, columns):
            for c in range(group * channels // layer.groups, (group + 1) * channels // layer.groups):
                for i, j in itertools.product(range(kh), range(kw)):
                    r = source(y + i * dh, height, layer.padding_mode)
                    s = source(x + j * dw, width, layer.padding_mode)
                    index.append(nothing if r is None or s is None else (c * height + r) * width + s)
    flat = torch.cat([a.flatten(1), a.new_zeros(n, 1)], 1)
    return flat[:, index].reshape(n, layer.groups, len(rows) * len(columns), -1)


def positions(layer: nn.Module, g: Tensor) -> Tensor:
    """Gradients at the layer's output, ``[N, groups, T, d_out]``."""
    if isinstance(layer, nn.Linear):
        return g.reshape(len(g), 1, -1, g.shape[-1])
    return g.reshape(len(g), groups(layer), -1, g.shape[2] * g.shape[3]).transpose(2, 3)


def covariance(vectors: Tensor) -> Tensor:
    """Sum of the outer products of ``[N, T, d]``, divided by N."""
    total = vectors.new_zeros(vectors.shape[-1], vectors.shape[-1])
    for example in vectors:
        for v in example:
            total = total + torch.outer(v, v)
    return total / len(vectors)


def factors(layer: nn.Module, a: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of each group, differentiable in ``a`` and ``g``."""
    p, q = patches(layer, a), positions(layer, g)
    return [(covariance(p[:, i]), covariance(q[:, i]) / q.shape[2]) for i in range(groups(layer))]


# -------------------------------------------------------------------------------------------------- rho


def is_read(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def read(model: nn.Module, loss: Loss, *args: Any, names: list[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """(a, g) of every layer of THIS model, with a graph to its parameters."""
    layers = {n: m for n, m in model.named_modules() if is_read(m) and (names is None or n in names)}
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [m.register_forward_hook(lambda m, i, o: seen.update({m: (i[0], o)})) for m in layers.values()]
    total = loss(model(*args))
    for handle in handles:
        handle.remove()
    layers = {name: layer for name, layer in layers.items() if layer in seen}
    outputs = [seen[layer][1] for layer in layers.values()]
    gradients = torch.autograd.grad(total, outputs, create_graph=True)
    return {name: (seen[layer][0], g) for (name, layer), g in zip(layers.items(), gradients, strict=True)}


def radii(model: nn.Module, loss: Loss, *args: Any, names: list[str] | None = None) -> dict[str, Tensor]:
    """rho_l of every layer, with a graph to the parameters of this model."""
    result = {}
    for name, (a, g) in read(model, loss, *args, names=names).items():
        blocks = factors(model.get_submodule(name), a, g)
        tops = [torch.linalg.eigvalsh(A)[-1] * torch.linalg.eigvalsh(G)[-1] for A, G in blocks]
        result[name] = torch.stack(tops).max()
    return result


def rho_and_gradient(
    model: nn.Module, loss: Loss, *args: Any, reduction: str = "max", names: list[str] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """rho and its gradient at all parameters, computed on a copy; zero where rho does not depend on a parameter."""
    twin = copy.deepcopy(model)
    values = torch.stack(list(radii(twin, loss, *args, names=names).values()))
    rho = values.max() if reduction == "max" else values.sum()
    gradient = torch.autograd.grad(rho, list(twin.parameters()), allow_unused=True, materialize_grads=True)
    return rho.detach(), list(gradient)


def in_order(gradients: Mapping[nn.Parameter, Tensor], parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Gradients of some parameters as a list over all of them."""
    return [gradients.get(p) for p in parameters]


def assert_gradients_close(seen: list[Tensor | None], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Compare gradients over all parameters, relative to the norm of the whole."""
    whole = torch.cat([e.flatten() for e in expected])
    other = torch.cat(
        [(torch.zeros_like(e) if s is None else s).flatten() for s, e in zip(seen, expected, strict=True)]
    )
    assert whole.norm() > 0
    assert (whole - other).norm() <= tolerance * whole.norm()


# -------------------------------------------------------------------------------------------------- networks


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual addition and a head, ReLU as one likes."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        x = self.relu(self.bn2(self.conv(x)) + x)
        return self.head(x.mean((2, 3)))


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), seed, dtype
    )


def seeded(make: Callable[[], Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Make a network whose weights depend on the seed alone, and leave torch's generator alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def batch(*shape: int, classes: int = 3, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs of the given shape and a label for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, shape[:1], generator=generator)


def cross_entropy_sum(y: Tensor) -> Loss:
    return lambda output: F.cross_entropy(output, y, reduction="sum")
