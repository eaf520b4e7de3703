"""Modules and parameters that are used in several places."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from kfac_flat import FlatKFAC
from tests.optimizer.loops import step


def test_mask_terms_of_layers_with_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.0), model, mu=0.1, reduction="sum", clip=None)
    step(model, optimizer)
    terms = optimizer.state_dict()["kfac_flat"]["mask_terms"]
    both = optimizer.input_mask_gradients()[model[2].weight]
    assert torch.allclose(both, terms["2"] + terms["4"])
    assert (terms["2"] > 0).any()
    assert (terms["4"] > 0).any()
