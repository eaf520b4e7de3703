"""Magnitude pruning removes the neurons with the smallest weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("order", [1, 2])
def test_the_norm_is_the_one_asked_for(order: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1))
    expected = []
    for weight in (model[0].weight, model[2].weight.transpose(0, 1)):
        norms = [sum(abs(v) ** order for v in row.flatten().tolist()) ** (1 / order) for row in weight]
        expected += [norm / (sum(norms) / len(norms)) for norm in norms]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = MagnitudePruner(
        model, optimizer, torch.randn(1, 2, 8, 8), target=0.5, start=1, every=1, events=1, order=order
    )
    torch.testing.assert_close(torch.tensor(pruner._scores()), torch.tensor(expected))


def test_other_norms_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="order=3 must be 1 or 2"):
        MagnitudePruner(model, optimizer, torch.randn(1, 4), target=0.5, order=3)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.permutations(range(8)), st.floats(0.1, 10), st.sampled_from([1, 2]))
def test_scores_go_along_when_neurons_change_places_and_a_layers_scale_does_not_matter(
    seed: int, places: list[int], scale: float, order: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = MagnitudePruner(model, optimizer, torch.randn(1, 4), target=0.5, order=order)
    before = torch.tensor(pruner._scores())
    with torch.no_grad():
        model[0].weight.copy_(scale * model[0].weight[places])
        model[2].weight.copy_(model[2].weight[:, places])
    torch.testing.assert_close(torch.tensor(pruner._scores()), torch.cat([before[:8][places], before[8:]]))
