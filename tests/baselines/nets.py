"""Tiny networks in float64, each with its forward pass once more, written such that what layers read can be masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Mask = Callable[[str, Tensor], Tensor]  # (map, its values [N, C, ...] as a layer reads them) -> values


def plain(where: str, z: Tensor) -> Tensor:
    return z


class Mlp(nn.Module):
    """Two hidden layers, and maps of one entry."""

    widths: ClassVar = {"a": 7, "b": 5}  # of the groups of neurons, in the order of their ids
    entries: ClassVar = {"a": 1, "b": 1}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 7), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))

    def again(self, x: Tensor, mask: Mask) -> Tensor:
        z = mask("a", F.relu(self.a(x)))
        return self.head(mask("b", F.relu(self.b(z))))

    @staticmethod
    def inputs(count: int) -> Tensor:
        return torch.randn(count, 4, dtype=torch.float64)


class ConvNet(nn.Module):
    """Conv, BatchNorm, ReLU; then pooled by maximum, and at last flattened."""

    widths: ClassVar = {"a": 4, "b": 5}
    entries: ClassVar = {"a": 64, "b": 16}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.b, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.a(x))))
        return self.head(self.pool(F.relu(self.b(x))).flatten(1))

    def again(self, x: Tensor, mask: Mask) -> Tensor:
        z = mask("a", F.relu(self.norm(self.a(x))))
        z = mask("b", F.relu(self.b(F.max_pool2d(z, 2))))
        return self.head(F.max_pool2d(z, 2).flatten(1))

    @staticmethod
    def inputs(count: int) -> Tensor:
        return torch.randn(count, 2, 8, 8, dtype=torch.float64)


class Residual(nn.Module):
    """A block whose second convolution is tied to the stem by an addition; two layers read the sum."""

    widths: ClassVar = {"stem": 4, "a": 6}
    entries: ClassVar = {"stem": 36, "a": 36}

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.left(x).mean((2, 3)) + self.right(x).mean((2, 3))

    def again(self, x: Tensor, mask: Mask) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.b(mask("a", F.relu(self.a(mask("stem", x))))))
        return self.left(mask("stem", x)).mean((2, 3)) + self.right(mask("stem", x)).mean((2, 3))

    @staticmethod
    def inputs(count: int) -> Tensor:
        return torch.randn(count, 2, 6, 6, dtype=torch.float64)


NETS: dict[str, Any] = {net.__name__: net for net in (Mlp, ConvNet, Residual)}


def built(name: str, seed: int = 0, count: int = 6, training: bool = True) -> tuple[Any, Tensor, Tensor]:
    """Return a network with statistics of its own in BatchNorm, inputs and labels."""
    torch.manual_seed(seed)
    model, x = NETS[name]().double(), NETS[name].inputs(count)
    model.train()(2 * NETS[name].inputs(8) + 0.3)
    return model.train(training), x, torch.randint(3, (count,))
