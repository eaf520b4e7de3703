"""The methods that are compared, by name: how each wraps the optimizer, and how it prunes.

A new one is a line in :data:`METHODS`. ``optimizer`` is given the task's own optimizer and the model, and returns what
the training loop steps; ``pruner`` is given the model, that optimizer, an example and NeuronPruner's options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from baselines import (
    APoZPruner,
    GateTaylorPruner,
    MagnitudePruner,
    PenaltyInThetaOnly,
    PenaltyInTrainingOnly,
    RandomPruner,
    TaylorPruner,
)
from benchmarks.tasks import Task
from kfac_flat import FlatKFAC, NeuronPruner


def unwrapped(base: Optimizer, model: nn.Module) -> Optimizer:
    """Train with the task's own optimizer."""
    return base


@dataclass(frozen=True)
class Timing:
    """When the pruner is stepped: after ``first`` updates of the weights, and from then on every so many.

    Attributes:
        first: Updates before the first step.
        interval: Updates from one step to the next.
        options: What the pruner has to know of it.
    """

    first: int
    interval: int
    options: dict[str, Any]

    def is_due(self, updates: int) -> bool:
        """Tell whether the pruner is stepped after so many updates."""
        return updates >= self.first and (updates - self.first) % self.interval == 0


Timer = Callable[[Task, int, int, int], Timing]


def each_epoch(task: Task, epochs: int, updates: int, going: int) -> Timing:
    """Step at the end of every epoch, with the removals where the task has them."""
    return Timing(updates, updates, task.removals(epochs))


def one_by_one(task: Task, epochs: int, updates: int, going: int) -> Timing:
    """Train to the end of the first third, then remove single neurons evenly until the task's last removal.

    Where there are more neurons than updates, as few at once as it takes.
    """
    first, last = max(1, epochs // 3), task.last_removal(epochs)
    there = max(1, (last - first) * updates)
    each = math.ceil(going / there)
    return Timing(first * updates, there * each // going, {"start": 1, "every": 1, "neurons_per_event": each})


@dataclass(frozen=True)
class Method:
    """How to train and how to prune.

    Attributes:
        optimizer: Wraps the task's optimizer over a model.
        pruner: Makes a pruner; None for a method that only trains.
        timing: When the pruner is stepped, given the task, epochs, updates in an epoch, and how many neurons are to go.
        options: Of the pruner.
    """

    optimizer: Callable[[Optimizer, nn.Module], Optimizer] = unwrapped
    pruner: Callable[..., Any] | None = NeuronPruner
    timing: Timer = each_epoch
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "sgd": Method(pruner=None),
    "hgnp": Method(FlatKFAC),
    # As in the paper: the penalty in full at every step, equal cuts; its weight is not to be had.
    "hgnp-plain": Method(partial(FlatKFAC, every=1, batch_fraction=1.0, clip=None), options={"pace": "linear"}),
    "theta": Method(),  # mu = 0 in training and in Theta
    "penalty-in-theta-only": Method(PenaltyInThetaOnly),
    "penalty-in-training-only": Method(PenaltyInTrainingOnly),
    "taylor": Method(pruner=TaylorPruner),
    "taylor-flops": Method(pruner=TaylorPruner, options={"flops_weight": 1e-3}),
    "taylor-one-by-one": Method(pruner=TaylorPruner, timing=one_by_one),  # as in the paper
    "taylor2019": Method(pruner=GateTaylorPruner),
    "magnitude-l1": Method(pruner=MagnitudePruner, options={"order": 1}),
    "magnitude-l2": Method(pruner=MagnitudePruner, options={"order": 2}),
    "apoz": Method(pruner=APoZPruner),
    "random": Method(pruner=RandomPruner),
}
