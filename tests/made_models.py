"""What a user's module may hold, for the command line to find: models, what makes them, and what does not."""

from __future__ import annotations

from torch import Tensor, nn


class Tower(nn.Module):
    """A class that needs no arguments, or takes some."""

    def __init__(self, width: int = 8, *, depth: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6 if i == 0 else width, width, bias=bias) for i in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Tokens(nn.Module):
    """Takes two tensors, one of them of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(11, 4), nn.Linear(4, 10), nn.Linear(10, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids)).relu() * mask.unsqueeze(-1))


def build() -> nn.Module:
    return Tower(12)


def build_wide(width: int) -> nn.Module:
    return Tower(width)


def build_nothing() -> dict[str, int]:
    return {"width": 3}


class Shelf:
    """Holds models, and a way to make them."""

    model = Tower(5)

    @staticmethod
    def build() -> nn.Module:
        return Tower(7)


class Branching(nn.Module):
    """Its code depends on the data, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class PartlyOpaque(nn.Module):
    """Has a part that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.head = nn.Linear(4, 4), Branching(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.first(x)))


model = Tower(9)
number = 3
