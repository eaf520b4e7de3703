"""Modules and parameters that are used in several places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import (
    penalty,
    plain,
    step,
    times,
)
from tests.reference import assert_gradients_close, batch, cross_entropy_sum, mlp, rho_and_gradient, seeded


def test_mask_terms_of_layers_with_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.1, reduction="sum", clip=None, every=1)
    step(model, optimizer)
    terms = optimizer.state_dict()["kfac_flat"]["mask_terms"]
    both = optimizer.input_mask_gradients()[model[2].weight]
    assert torch.allclose(both, terms["2"] + terms["4"])
    assert (terms["2"] > 0).any()
    assert (terms["4"] > 0).any()


class Tied(nn.Module):
    """Two modules with one weight: the second reads what the first one writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = (nn.Linear(a, b) for a, b in ((4, 6), (6, 6), (6, 6), (6, 3)))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(torch.tanh(self.stem(x)))))))


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_tied_weights_have_a_block_for_each_module_and_one_gradient(reduction: str) -> None:
    model, (x, y) = seeded(Tied), batch(8, 4)
    rho, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction=reduction)
    optimizer = plain(model, mu=0.3, reduction=reduction)
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert set(optimizer.radii()) == {"stem", "first", "second", "head"}
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)


def test_a_module_under_two_names_called_once_is_one_layer() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    _, gradient = rho_and_gradient(model, cross_entropy_sum(y), x, reduction="sum")
    model.alias = model[2]
    model.forward = lambda x: nn.Sequential.forward(model[:5], x)
    optimizer = plain(model, mu=0.3, reduction="sum")
    assert_gradients_close(penalty(model, optimizer, x, y), times(0.3, gradient))
    assert set(optimizer.radii()) == {"0", "2", "4"}


class Language(nn.Module):
    """Its head is tied to the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight.data = self.embedding.weight.data.clone()
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).mean(1))))


def test_a_head_tied_to_an_embedding_is_read_and_the_embedding_named() -> None:
    model, other = seeded(lambda: Language(True)), seeded(lambda: Language(False))
    tokens, y = torch.arange(40).view(8, 5) % 7, torch.arange(8) % 7
    rho, gradient = rho_and_gradient(other, cross_entropy_sum(y), tokens, reduction="sum")
    embedding, weight, bias, head = gradient
    optimizer = plain(model, mu=0.3, reduction="sum")
    assert_gradients_close(penalty(model, optimizer, tokens, y), times(0.3, [embedding + head, weight, bias]))
    assert optimizer.rho == pytest.approx(float(rho), rel=1e-9)
    assert optimizer.skipped_layers.keys() == {"embedding"}
