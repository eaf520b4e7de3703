"""Magnitude pruning removes the neurons with the smallest weights."""

from __future__ import annotations

import torch
from torch import nn

from baselines import MagnitudePruner


def pruned_outputs(model: nn.Module, shape: tuple[int, ...]) -> dict[str, list[int]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = MagnitudePruner(model, optimizer, torch.randn(shape), target=0.5, start=1, every=1, events=1)
    return {name: gone.tolist() for name, gone in pruner.step().removed.items()}


def test_the_smallest_relative_norms_go_and_a_layers_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    ratios = torch.cat([w.norm(dim=1) / w.norm(dim=1).mean() for w in weights])
    smallest = ratios.argsort()[:7].sort().values.tolist()
    expected = {"0": [i for i in smallest if i < 8], "2": [i - 8 for i in smallest if i >= 8]}
    with torch.no_grad():
        model[2].weight.mul_(1000)
    assert pruned_outputs(model, (1, 5)) == {name: gone for name, gone in expected.items() if gone}


def test_tied_neurons_count_with_all_their_weights() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.head(x + self.b(x))

    model = Residual()
    with torch.no_grad():
        model.a.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        model.b.weight.copy_(torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])))
    assert pruned_outputs(model, (1, 4)) == {"a": [1, 2], "b": [1, 2]}
