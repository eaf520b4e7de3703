"""The penalty in Theta only, and in training only: what each does to the gradients, and what NeuronPruner reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from baselines import PenaltyInThetaOnly, PenaltyInTrainingOnly
from kfac_flat import FlatKFAC, NeuronPruner
from tests.baselines.nets import NETS, built
from tests.pruning.nets import CASES

MU = 0.05


def wrapped(kind: Any, model: nn.Module, **options: Any) -> Optimizer:
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return optimizer if kind is SGD else kind(optimizer, model, mu=MU, seed=1, **options)


def trained(kind: Any, model: nn.Module, x: Tensor, y: Tensor, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Train; returns all parameters one after the other, and Theta."""
    optimizer = wrapped(kind, model, **options)
    pruner = NeuronPruner(model, optimizer, x[:1], target=0.1, start=1, every=1, events=1)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x + 0.1 * step), y).backward()
        optimizer.step()
    scores = pruner._saliency.scores()
    assert scores is not None
    return torch.cat([p.detach().flatten() for p in model.parameters()]), torch.tensor(scores)


@pytest.mark.parametrize("name", NETS)
def test_the_penalty_in_theta_only_trains_as_without_it_and_scores_as_with_it(name: str) -> None:
    found = {kind: trained(kind, *built(name), steps=1) for kind in (SGD, FlatKFAC, PenaltyInThetaOnly)}
    assert torch.equal(found[PenaltyInThetaOnly][0], found[SGD][0])
    torch.testing.assert_close(found[PenaltyInThetaOnly][1], found[FlatKFAC][1], rtol=1e-5, atol=1e-8)
    assert not torch.allclose(found[SGD][1], found[FlatKFAC][1], rtol=1e-2)
    assert not torch.equal(found[SGD][0], found[FlatKFAC][0])


@pytest.mark.parametrize("name", NETS)
def test_the_penalty_in_training_only_trains_as_with_it_and_scores_as_without_it(name: str) -> None:
    found = {kind: trained(kind, *built(name), steps=1) for kind in (SGD, FlatKFAC, PenaltyInTrainingOnly)}
    assert torch.equal(found[PenaltyInTrainingOnly][0], found[FlatKFAC][0])
    torch.testing.assert_close(found[PenaltyInTrainingOnly][1], found[SGD][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_over_many_steps_the_trajectories_are_those_of_sgd_and_of_the_full_method(every: int, clip: Any) -> None:
    options = {"every": every, "clip": clip, "batch_fraction": 1.0}
    found = {
        kind: trained(kind, *built("ConvNet"), steps=7, **(options if kind is not SGD else {}))[0]
        for kind in (SGD, FlatKFAC, PenaltyInThetaOnly, PenaltyInTrainingOnly)
    }
    assert torch.equal(found[PenaltyInThetaOnly], found[SGD])
    assert torch.equal(found[PenaltyInTrainingOnly], found[FlatKFAC])


@pytest.mark.parametrize("case", ["mlp", "residual", "grouped", "depthwise_separable", "unet", "tied_linears"])
def test_what_goes_through_the_weights_is_counted_whatever_the_layer(case: str) -> None:
    """Grouped, transposed and shared weights: Theta by the loss's own gradients, as they were before the step."""

    def thetas(kind: Any) -> Tensor:
        model, x = CASES[case].build()
        return trained(kind, model, x, torch.arange(len(x)) % 3, steps=1)[1]

    plain, full = thetas(SGD), thetas(FlatKFAC)
    largest = float(full.max())
    torch.testing.assert_close(thetas(PenaltyInTrainingOnly) / largest, plain / largest, rtol=0, atol=1e-6)
    torch.testing.assert_close(thetas(PenaltyInThetaOnly) / largest, full / largest, rtol=0, atol=1e-6)
    assert float((full - plain).abs().max()) > 1e-3 * largest


def test_both_are_pruned_like_any_other_optimizer() -> None:
    for kind in (PenaltyInThetaOnly, PenaltyInTrainingOnly):
        model, x, y = built("ConvNet")
        optimizer = wrapped(kind, model, every=2)
        pruner = NeuronPruner(model, optimizer, x[:1], target=0.5, start=1, every=1, events=2)
        for _ in range(3):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            pruner.step()
        assert pruner.size.neurons == 5
