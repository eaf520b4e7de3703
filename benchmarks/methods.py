"""The methods that are compared, by name: how each wraps the optimizer, and how it prunes.

A new one is a line in :data:`METHODS`. ``optimizer`` is given the task's own optimizer and the model, and returns what
the training loop steps; ``pruner`` is given the model, that optimizer, an example, training images where it reads any,
and NeuronPruner's options.

Some methods remove no neurons: EigenDamage replaces layers by bottlenecks, weight pruning and SNIP set single weights
to zero. At sparsity s these remove as many parameters as a network loses of which every layer loses a share s of its
neurons (:func:`in_parameters`), so that what is left is as large, if not as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from baselines import (
    SAM,
    SNIP,
    APoZPruner,
    ChannelOBDPruner,
    ChannelOBSPruner,
    DataFreePruner,
    EigenDamagePruner,
    GateTaylorPruner,
    HybridPruner,
    KronOBDPruner,
    KronOBSPruner,
    MagnitudePruner,
    MagnitudeWeightPruner,
    PenaltyInThetaOnly,
    PenaltyInTrainingOnly,
    RandomPruner,
    SpectralRadius,
    TaylorPruner,
)
from benchmarks.peers import SparseTorchPruning, TaylorTorchPruning, TorchPruning
from benchmarks.tasks import CRITERION, Task
from kfac_flat import FlatKFAC, NeuronPruner

Batches = list[tuple[Tensor, Tensor]]  # images and labels

# ---------------------------------------------------------------- optimizers


def unwrapped(base: Optimizer, model: nn.Module) -> Optimizer:
    """Train with the task's own optimizer."""
    return base


sharpness_aware = partial(SAM, criterion=CRITERION)
true_hessian = partial(SpectralRadius, criterion=CRITERION)

# ---------------------------------------------------------------- when, and how much


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


def once(task: Task, epochs: int, updates: int, going: int) -> Timing:
    """Remove all at the end of the epoch in which others remove the last."""
    return Timing(updates, updates, {"start": task.last_removal(epochs), "every": 1, "events": 1})


def capped(task: Task, epochs: int, updates: int, going: int) -> Timing:
    """Step at the end of every epoch; layers lose at most 95 % in a single removal, and half in each of several.

    As in the comparison of Wang et al. [arXiv 1905.05934].
    """
    timing = each_epoch(task, epochs, updates, going)
    cap = 0.95 if timing.options["events"] == 1 else 0.5
    return replace(timing, options={**timing.options, "max_step": cap})


def when_made(task: Task, epochs: int, updates: int, going: int) -> Timing:
    """Leave the time to a pruner that has removed all when it has been made."""
    return Timing(updates, updates, {})


def in_neurons(model: nn.Module, example: Tensor, sparsity: float) -> float:
    """Share of the neurons to remove."""
    return sparsity


def in_parameters(model: nn.Module, example: Tensor, sparsity: float) -> float:
    """Share of the parameters to remove: as many as go when every layer loses this share of its neurons."""
    optimizer = SGD(model.parameters())
    alike = MagnitudePruner(model, optimizer, example, target=sparsity, start=1, events=1, ranking="layer").plan()
    return 1 - alike.after.parameters / alike.before.parameters


# ---------------------------------------------------------------- pruners of weights, which need no example


def small_weights(model: nn.Module, optimizer: Optimizer, example: Tensor, **options: Any) -> MagnitudeWeightPruner:
    """Set the smallest weights to zero."""
    return MagnitudeWeightPruner(model, optimizer, **options)


def insensitive_weights(
    model: nn.Module, optimizer: Optimizer, example: Tensor, batches: Batches, **options: Any
) -> SNIP:
    """Set weights to zero before training."""
    return SNIP(model, optimizer, batches, CRITERION, **options)


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """How to train and how to prune.

    Attributes:
        optimizer: Wraps the task's optimizer over a model.
        pruner: Makes a pruner; None for a method that only trains.
        timing: When the pruner is stepped, given the task, epochs, updates in an epoch, and how many neurons are to go.
        options: Of the pruner.
        reads: Whether the pruner is given batches of training images with their labels, behind the example.
        target: What the pruner is asked for at a sparsity, given the model and an example.
    """

    optimizer: Callable[[Optimizer, nn.Module], Optimizer] = unwrapped
    pruner: Callable[..., Any] | None = NeuronPruner
    timing: Timer = each_epoch
    options: dict[str, Any] = field(default_factory=dict)
    reads: bool = False
    target: Callable[[nn.Module, Tensor, float], float] = in_neurons


# The threshold is the paper's for both of its networks on CIFAR-10 [Ebrahimi & Klabjan, arXiv 2111.08577, table 4].
HYBRID = {"taylor": TaylorPruner, "threshold": 0.878}

METHODS = {
    "sgd": Method(pruner=None),
    "hgnp": Method(FlatKFAC),
    # As in the paper: the penalty in full at every step, of all layers, equal cuts; its weight is not to be had.
    "hgnp-plain": Method(
        partial(FlatKFAC, penalty="linear", every=1, survey_every=1, batch_fraction=1.0, clip=None),
        options={"pace": "linear"},
    ),
    "hybrid": Method(FlatKFAC, HybridPruner, options=HYBRID),
    "theta": Method(),  # mu = 0 in training and in Theta
    "penalty-in-theta-only": Method(PenaltyInThetaOnly),
    "penalty-in-training-only": Method(PenaltyInTrainingOnly),
    "sam": Method(sharpness_aware),
    "sam+taylor": Method(sharpness_aware, TaylorPruner),
    "spectral-radius": Method(true_hessian),
    "spectral-radius+taylor": Method(true_hessian, TaylorPruner),
    "taylor": Method(pruner=TaylorPruner),
    "taylor-flops": Method(pruner=TaylorPruner, options={"flops_weight": 1e-3}),
    "taylor-one-by-one": Method(pruner=TaylorPruner, timing=one_by_one),  # as in the paper
    "taylor2019": Method(pruner=GateTaylorPruner),
    "c-obd": Method(pruner=ChannelOBDPruner, timing=capped, reads=True),
    "c-obs": Method(pruner=ChannelOBSPruner, timing=capped, reads=True),
    "kron-obd": Method(pruner=KronOBDPruner, timing=capped, reads=True),
    "kron-obs": Method(pruner=KronOBSPruner, timing=capped, reads=True),
    "eigendamage": Method(pruner=EigenDamagePruner, options={"pace": "cubic"}, reads=True, target=in_parameters),
    "eigendamage-one-pass": Method(pruner=EigenDamagePruner, timing=once, reads=True, target=in_parameters),
    "data-free": Method(pruner=DataFreePruner),
    "magnitude-l1": Method(pruner=MagnitudePruner, options={"order": 1}),
    "magnitude-l2": Method(pruner=MagnitudePruner, options={"order": 2}),
    "apoz": Method(pruner=APoZPruner),
    "random": Method(pruner=RandomPruner),
    "weight-magnitude": Method(pruner=small_weights, target=in_parameters),
    "snip": Method(pruner=insensitive_weights, timing=when_made, reads=True, target=in_parameters),
    "tp-group-taylor": Method(pruner=TaylorTorchPruning, reads=True),
    "tp-group-magnitude": Method(pruner=TorchPruning, reads=True),
    "tp-group-norm": Method(pruner=SparseTorchPruning, reads=True),
}
