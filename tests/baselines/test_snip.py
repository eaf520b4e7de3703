"""SNIP against finite differences of the loss at masks, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines import SNIP
from baselines.snip import connection_sensitivity
from tests.optimizer.loops import same, snapshot
from tests.reference import Residual, batch, mlp, seeded


def test_sensitivity_is_the_slope_of_the_loss_at_a_mask_on_the_weight() -> None:
    model = mlp()
    batches = [batch(8, 4, seed=seed) for seed in (1, 2)]
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    found = connection_sensitivity(model, weights, batches, F.cross_entropy)
    with torch.no_grad():
        for name, weight in weights.items():
            for i in range(weight.numel()):
                at, losses = weight.view(-1)[i].clone(), []
                for mask in (1 + 1e-6, 1 - 1e-6):
                    weight.view(-1)[i] = at * mask
                    losses.append(sum(F.cross_entropy(model(x), y) for x, y in batches) / 2)
                weight.view(-1)[i] = at
                slope = abs(float(losses[0] - losses[1])) / 2e-6
                assert float(found[name].view(-1)[i]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_least_sensitive_of_all_layers_go_at_once_and_training_keeps_them_zero() -> None:
    model, (x, y) = mlp(), batch(8, 4)
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(x), y).backward()
    scores = [
        abs(w * g)
        for p in reference.parameters()
        if p.dim() > 1
        for w, g in zip(p.flatten().tolist(), p.grad.flatten().tolist(), strict=True)
    ]
    gone = set(sorted(range(len(scores)), key=scores.__getitem__)[: round(0.9 * len(scores))])
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = SNIP(model, optimizer, [(x, y)], nn.CrossEntropyLoss(), target=0.9)
    for _ in range(3):
        zeros = [v == 0 for p in model.parameters() if p.dim() > 1 for v in p.flatten().tolist()]
        assert zeros == [i in gone for i in range(len(scores))]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert not pruner.step()
    assert len(pruner.history) == 3
    assert pruner.finished


def test_making_it_changes_nothing_but_the_weights_that_go() -> None:
    """Running statistics, gradients, mode and torch's generator included."""
    model, (x, y) = seeded(lambda: nn.Sequential(Residual(), nn.Dropout(0.5))), batch(6, 2, 5, 5)
    optimizer = SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    before, generator = snapshot(model, optimizer), torch.get_rng_state()
    pruner = SNIP(model, optimizer, [(x, y)], nn.CrossEntropyLoss(), target=0.5)
    assert torch.equal(generator, torch.get_rng_state())
    with torch.no_grad():
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name)[~mask].any()
            before[0][name][~mask] = 0
    assert same(snapshot(model, optimizer), before)


def test_scaling_the_loss_does_not_matter() -> None:
    masks = []
    for factor in (1.0, 1000.0):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        criterion = lambda output, y, factor=factor: factor * F.cross_entropy(output, y)  # noqa: E731
        masks.append(SNIP(model, optimizer, [batch(8, 4)], criterion, target=0.5).masks)
    assert same(*masks)


def test_data_that_tell_nothing_are_refused_and_nothing_changes() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="at least one batch"):
        SNIP(model, optimizer, [], nn.CrossEntropyLoss(), target=0.5)
    x, y = batch(8, 4)
    with pytest.raises(ValueError, match="not finite"):
        SNIP(model, optimizer, [(x * torch.nan, y)], nn.CrossEntropyLoss(), target=0.5)
    assert same(snapshot(model, optimizer), before)
