"""One training: a network from its first weights to its last, losing neurons on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.execution import PLAIN, Execution
from benchmarks.methods import Method, in_neurons
from benchmarks.tasks import Task
from examples.digits import Images, synchronize

BUDGETS = ("neurons", "macs")


@dataclass(frozen=True)
class Training:
    """What is trained, and how; all that is drawn at random follows the seed.

    Attributes:
        task: The network and what it learns.
        method: How neurons go.
        sparsity: Share of the budget to remove on the way; 0 for the dense network.
        seed: Of weights and batches.
        epochs: How many.
        budget: What the sparsity is a share of: one of :data:`BUDGETS`.
        execution: How the network is run.
    """

    task: Task
    method: Method
    sparsity: float
    seed: int
    epochs: int
    budget: str = "neurons"
    execution: Execution = PLAIN


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        model: As it is after the last epoch.
        seconds: How long all epochs took, removals among them.
        missed: Share of the budget that should have gone and is still there.
    """

    model: nn.Module
    seconds: float
    missed: float


def train(training: Training, data: tuple[Images, Images], on_epoch: Callable[[], None] = lambda: None) -> Trained:
    """Train one network and remove a share of the budget on the way.

    What is to be compiled is compiled before the first removal and after the last one: each removal makes another
    network, and one that lasts for an epoch is not worth it.
    """
    task, method, execution = training.task, training.method, training.execution
    torch.manual_seed(training.seed)
    execution.forget_compiled()
    train_set = data[0]
    device, example = train_set.images.device, train_set.images[:1]
    shuffle = torch.Generator(device).manual_seed(training.seed)
    model = execution.placed(task.network(), device)
    optimizer = method.optimizer(task.optimizer(model), model)
    pruner = None
    if training.sparsity and method.pruner:
        neurons = in_neurons(model, example, training.sparsity, training.budget)
        timing = method.timing(task, training.epochs, task.updates(train_set), neurons, training.budget)
        goal = method.goal(model, example, training.sparsity, training.budget)
        read = [task.sample(train_set)] if method.reads else []
        pruner = method.pruner(model, optimizer, example, *read, **goal, **timing.options, **method.options)
    schedule = task.schedule(optimizer, training.epochs, train_set)

    start, updates = time.perf_counter(), 0
    for _ in range(training.epochs):
        lasting = pruner is None or pruner.finished or not pruner.progress
        way = execution if lasting else execution.eager
        for _ in task.epoch(model, optimizer, schedule, train_set, shuffle, way):
            updates += 1
            if pruner and timing.is_due(updates):
                pruner.step()
        on_epoch()
    synchronize(device)
    seconds = round(time.perf_counter() - start, 2)
    return Trained(model, seconds, max(0.0, round(goal["target"] - pruner.progress, 4)) if pruner else 0.0)
