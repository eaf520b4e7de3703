"""The methods that are compared, by name: how each wraps the optimizer, and how it prunes.

A new one is a line in :data:`METHODS`. ``optimizer`` is given the task's own optimizer and the model, and returns what
the training loop steps; ``pruner`` is given the model, that optimizer, an example, training images where it reads any,
and NeuronPruner's options.

The budget is the network's "neurons" or its "macs" (multiply-accumulates). Some methods remove no neurons: EigenDamage
replaces layers by bottlenecks, weight pruning and SNIP set single weights to zero. At sparsity s of the neurons these
remove as many parameters as a network loses of which every layer loses a share s of its neurons
(:func:`in_parameters`), so that what is left is as large, if not as fast. EigenDamage removes a share of the MACs like
all others; zeros save none, so there weights go as in a network whose layers are narrowed alike to that many MACs.
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
from benchmarks.sizes import measured
from benchmarks.tasks import CRITERION, Task
from kfac_flat import FlatKFAC, NeuronPruner, PruneReport

Batches = list[tuple[Tensor, Tensor]]  # images and labels

# ---------------------------------------------------------------- optimizers


def unwrapped(base: Optimizer, model: nn.Module) -> Optimizer:
    """Train with the task's own optimizer."""
    return base


sharpness_aware = partial(SAM, criterion=CRITERION)
true_hessian = partial(SpectralRadius, criterion=CRITERION)
at_every_step = partial(
    FlatKFAC, fisher="empirical", criterion=CRITERION, penalty="linear", every=1, survey_every=1, batch_fraction=1.0
)

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


Timer = Callable[[Task, int, int, int, str], Timing]


def each_epoch(task: Task, epochs: int, updates: int, going: int, budget: str) -> Timing:
    """Step at the end of every epoch, with the removals where the task has them."""
    return Timing(updates, updates, task.removals(epochs))


def one_by_one(task: Task, epochs: int, updates: int, going: int, budget: str) -> Timing:
    """Train to the end of the first third, then remove single neurons evenly until the task's last removal.

    Where there are more neurons than updates, as few at once as it takes. Of MACs, as many equal shares go.
    """
    first, last = max(1, epochs // 3), task.last_removal(epochs)
    there = max(1, (last - first) * updates)
    each = math.ceil(going / there)
    amount = {"neurons_per_event": each} if budget == "neurons" else {"events": -(-going // each), "pace": "linear"}
    return Timing(first * updates, there * each // going, {"start": 1, "every": 1, **amount})


def once(task: Task, epochs: int, updates: int, going: int, budget: str) -> Timing:
    """Remove all at the end of the epoch in which others remove the last."""
    return Timing(updates, updates, {"start": task.last_removal(epochs), "every": 1, "events": 1})


def capped(task: Task, epochs: int, updates: int, going: int, budget: str) -> Timing:
    """Step at the end of every epoch; layers lose at most 95 % in a single removal, and half in each of several.

    As in the comparison of Wang et al. [arXiv 1905.05934].
    """
    timing = each_epoch(task, epochs, updates, going, budget)
    cap = 0.95 if timing.options["events"] == 1 else 0.5
    return replace(timing, options={**timing.options, "max_step": cap})


def when_made(task: Task, epochs: int, updates: int, going: int, budget: str) -> Timing:
    """Leave the time to a pruner that has removed all when it has been made."""
    return Timing(updates, updates, {})


# What a pruner is asked for, as its options: given the model, an example, and the share of which budget is to go.
Goal = Callable[[nn.Module, Tensor, float, str], dict[str, Any]]


def of_the_budget(model: nn.Module, example: Tensor, share: float, budget: str) -> dict[str, Any]:
    """Remove a share of the budget itself."""
    return {"target": share, "budget": budget}


def of_parameters(model: nn.Module, example: Tensor, share: float, budget: str) -> dict[str, Any]:
    """Remove as many parameters as go when every layer loses the same share of its neurons."""
    return {"target": in_parameters(model, example, share, budget)}


def of_directions(model: nn.Module, example: Tensor, share: float, budget: str) -> dict[str, Any]:
    """Remove a share of the MACs, or as many parameters as go with a share of each layer's neurons."""
    goal = of_parameters if budget == "neurons" else of_the_budget
    return goal(model, example, share, budget)


def in_parameters(model: nn.Module, example: Tensor, share: float, budget: str = "neurons") -> float:
    """Share of the parameters that go when all layers lose the same share of their neurons, to meet the budget."""
    alike = narrowed(model, example, share, budget)
    return 1 - alike.after.parameters / alike.before.parameters


def in_neurons(model: nn.Module, example: Tensor, share: float, budget: str) -> int:
    """Neurons that go, about."""
    if budget == "neurons":
        return round(share * measured(model, example)[0].neurons)
    alike = narrowed(model, example, share, budget)
    return alike.before.neurons - alike.after.neurons


def narrowed(model: nn.Module, example: Tensor, share: float, budget: str) -> PruneReport:
    """Plan to meet a budget such that all layers lose the same share of their neurons; nothing changes."""
    pruner = MagnitudePruner(
        *(model, SGD(model.parameters()), example), target=share, budget=budget, start=1, events=1, ranking="layer"
    )
    return pruner.plan()


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
        timing: When the pruner is stepped, given the task, epochs, updates in an epoch, how many neurons are to go, and
            the budget.
        options: Of the pruner.
        reads: Whether the pruner is given batches of training images with their labels, behind the example.
        goal: What the pruner is asked for.
    """

    optimizer: Callable[[Optimizer, nn.Module], Optimizer] = unwrapped
    pruner: Callable[..., Any] | None = NeuronPruner
    timing: Timer = each_epoch
    options: dict[str, Any] = field(default_factory=dict)
    reads: bool = False
    goal: Goal = of_the_budget


# The threshold is the paper's for both of its networks on CIFAR-10 [Ebrahimi & Klabjan, arXiv 2111.08577, table 4].
HYBRID = {"taylor": TaylorPruner, "threshold": 0.878}

# No paper has floors under the layers, and all read every step.
AS_PUBLISHED = {"max_share": 1.0, "readings": None}

METHODS = {
    "sgd": Method(pruner=None),
    "hgnp": Method(FlatKFAC),
    # As in the paper: the batch's own labels, the penalty in full at every step, equal cuts; its weight is not told.
    "hgnp-plain": Method(partial(at_every_step, mu=0.01, clip=None), options={**AS_PUBLISHED, "pace": "linear"}),
    "hgnp-thorough": Method(partial(at_every_step, mu=0.1, reduction="sum")),
    "hgnp-every-step": Method(partial(FlatKFAC, fisher="empirical", criterion=CRITERION, every=1, mu=0.03)),
    "hgnp-flat": Method(partial(FlatKFAC, every=1, mu=0.03)),
    "hgnp-flat-0.1": Method(partial(FlatKFAC, every=1, mu=0.1)),
    "hgnp-flat-sixteenth": Method(partial(FlatKFAC, every=1, mu=0.03, batch_fraction=1 / 16)),
    "hgnp-per-mac": Method(FlatKFAC, options={"per": "mac"}),
    "hybrid": Method(FlatKFAC, HybridPruner, options=HYBRID),
    "theta": Method(),  # mu = 0 in training and in Theta
    "penalty-in-theta-only": Method(PenaltyInThetaOnly),
    "penalty-in-training-only": Method(PenaltyInTrainingOnly),
    "sam": Method(sharpness_aware),
    "sam+taylor": Method(sharpness_aware, TaylorPruner),
    "sam-0.1+taylor": Method(partial(sharpness_aware, rho=0.1), TaylorPruner),
    "spectral-radius": Method(true_hessian),
    "spectral-radius+taylor": Method(true_hessian, TaylorPruner),
    "taylor": Method(pruner=TaylorPruner),
    "taylor-per-mac": Method(pruner=TaylorPruner, options={"per": "mac"}),
    "taylor-flops": Method(pruner=TaylorPruner, options={"flops_weight": 1e-3}),
    "taylor-one-by-one": Method(pruner=TaylorPruner, timing=one_by_one, options=AS_PUBLISHED),  # as in the paper
    "taylor2019": Method(pruner=GateTaylorPruner),
    "c-obd": Method(pruner=ChannelOBDPruner, timing=capped, reads=True),
    "c-obs": Method(pruner=ChannelOBSPruner, timing=capped, reads=True),
    "kron-obd": Method(pruner=KronOBDPruner, timing=capped, reads=True),
    "kron-obs": Method(pruner=KronOBSPruner, timing=capped, reads=True),
    "eigendamage": Method(pruner=EigenDamagePruner, options={"pace": "cubic"}, reads=True, goal=of_directions),
    "eigendamage-one-pass": Method(pruner=EigenDamagePruner, timing=once, reads=True, goal=of_directions),
    "data-free": Method(pruner=DataFreePruner),
    "magnitude-l1": Method(pruner=MagnitudePruner, options={"order": 1}),
    "magnitude-l2": Method(pruner=MagnitudePruner, options={"order": 2}),
    "apoz": Method(pruner=APoZPruner),
    "random": Method(pruner=RandomPruner),
    "weight-magnitude": Method(pruner=small_weights, goal=of_parameters),
    "snip": Method(pruner=insensitive_weights, timing=when_made, reads=True, goal=of_parameters),
    "tp-group-taylor": Method(pruner=TaylorTorchPruning, reads=True),
    "tp-group-magnitude": Method(pruner=TorchPruning, reads=True),
    "tp-group-norm": Method(pruner=SparseTorchPruning, reads=True),
}
