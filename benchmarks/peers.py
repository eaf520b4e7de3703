"""Torch-Pruning as a peer: its group Taylor, group magnitude and group norm, on the same tasks and the same schedule.

Used through its public API and at its best settings: all layers compete; small steps, importance computed anew in each,
as in its own iterative pruning; group norms divided by their maximum, with its sparse training (no weight decay, weight
5e-4) in all epochs up to the last removal.

What is known of it (1.6), and what is done about it here:

- It makes new Parameters when it cuts, which the optimizer does not hold. The optimizer is given them, as a new one
  with the same options would be, so that the schedule of the learning rate goes on; its momentum is lost.
- Its constructor leaves the model in eval mode. The mode is restored.
- Its global ratio counts tied channels once, and knows nothing of multiply-accumulates. Here it steps until as many
  neurons or MACs have gone as others count.
- Its Taylor importance never counts BatchNorm, whose branch asks for GroupNorm, and reads the gradients that happen to
  be there. It stays so, but that gradients of 1,024 training images are there. They go along in a cut.
- A group of one channel makes its regularizer divide zero by zero and writes the result into gradients. Such gradients
  stay as they were.
- ``max_pruning_ratio`` is not kept to when all layers compete, so it is not used: a layer may go down to one channel.

Needs torch-pruning (``pip install -e ".[benchmark]"``), which is imported when a pruner is made.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.tasks import CRITERION
from kfac_flat.pruning.budget import ROUNDING, Schedule
from kfac_flat.pruning.graph import NeuronGraph
from kfac_flat.pruning.layers import weight_of

STEPS = 400  # from all channels to none


class TorchPruning:
    """Group magnitude; the other two are subclasses. Stepped once an epoch like NeuronPruner.

    Args:
        model: The model being trained.
        optimizer: Any torch optimizer over its parameters.
        example: What the model is called with.
        batches: Training images with their labels, for importances that need gradients.
        target: Share of the budget to remove in the end.
        start: Epochs of training before the first removal.
        every: Epochs from one removal to the next.
        events: Number of removals.
        pace: How the target is divided among the events, as for NeuronPruner.
        budget: What ``target`` is a share of: the model's "neurons" or its "macs".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example: Tensor,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        target: float,
        start: int,
        every: int,
        events: int,
        pace: str = "cubic",
        budget: str = "neurons",
    ) -> None:
        self._model, self._optimizer, self._batches = model, optimizer, batches
        self._target, self._schedule = target, Schedule(start, every, events, pace)
        graph = NeuronGraph(model, example)
        self._hidden = [model.get_submodule(name) for name in graph.hidden]
        self._positions = {model.get_submodule(name): graph.positions[name] for name in graph.producers}
        self._budget = budget
        self._dense = self.amount
        self._epoch = self._event = 0
        outputs = [model.get_submodule(name) for name in graph.frozen]
        training = model.training
        self._peer = self._made(importlib.import_module("torch_pruning"), example, outputs)
        model.train(training)

    def _made(self, library: Any, example: Tensor, outputs: list[nn.Module]) -> Any:
        """Make the library's own pruner."""
        return library.pruner.BasePruner(
            self._model, example, self._importance(library.importance), **self._options(outputs)
        )

    def _options(self, outputs: list[nn.Module]) -> dict[str, Any]:
        return {"global_pruning": True, "pruning_ratio": 1.0, "iterative_steps": STEPS, "ignored_layers": outputs}

    def _importance(self, importance: Any) -> Any:
        return importance.GroupMagnitudeImportance(p=2)

    def _prepare(self) -> None:
        """Get ready for a removal."""

    @property
    def neurons(self) -> int:
        """Output channels of hidden layers as they are now."""
        return sum(len(weight_of(layer)) for layer in self._hidden)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of one example in the layers as they are now."""
        return sum(weight_of(layer).numel() * positions for layer, positions in self._positions.items())

    @property
    def amount(self) -> float:
        """What the model is in terms of the budget."""
        return float({"neurons": self.neurons, "macs": self.macs}[self._budget])

    @property
    def progress(self) -> float:
        """Share of the budget removed so far."""
        return 1 - self.amount / self._dense

    @property
    def finished(self) -> bool:
        """Whether all events have passed."""
        return self._event >= self._schedule.events

    def step(self) -> None:
        """End an epoch: remove neurons if the schedule says so."""
        self._epoch += 1
        if self.finished or not self._schedule.is_due(self._epoch):
            return
        self._event += 1
        self._prepare()
        left = self._dense * (1 - self._target * self._schedule.share(self._event))
        while self.amount > left + ROUNDING and self._peer.current_step < STEPS:
            self._peer.step()
        self._follow()

    def _follow(self) -> None:
        """Give the optimizer the new Parameters."""
        (group,) = self._optimizer.param_groups
        group["params"] = list(self._model.parameters())
        self._optimizer.state.clear()
        self._optimizer.zero_grad()


class TaylorTorchPruning(TorchPruning):
    """Group Taylor, on gradients of the training images read, in eval mode."""

    def _importance(self, importance: Any) -> Any:
        return importance.GroupTaylorImportance()

    def _prepare(self) -> None:
        training = self._model.training
        self._model.eval().zero_grad()
        for images, labels in self._batches:
            CRITERION(self._model(images), labels).backward()
        self._model.train(training)


class SparseTorchPruning(TorchPruning):
    """Group norm after sparse training."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *arguments: Any, **options: Any) -> None:
        super().__init__(model, optimizer, *arguments, **options)
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        self._peer.update_regularizer()
        reference = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            alive = reference()
            if alive is not None:
                alive._regularize()

        weakref.finalize(self, optimizer.register_step_pre_hook(before_step).remove)

    def _made(self, library: Any, example: Tensor, outputs: list[nn.Module]) -> Any:
        return library.pruner.GroupNormPruner(
            self._model, example, self._importance(library.importance), reg=5e-4, **self._options(outputs)
        )

    def _importance(self, importance: Any) -> Any:
        return importance.GroupMagnitudeImportance(p=2, normalizer="max")

    @torch.no_grad()
    def _regularize(self) -> None:
        """Add the regularizer's gradients, as long as there are removals to come."""
        if self.finished:
            return
        before = {p: p.grad.clone() for p in self._model.parameters() if p.grad is not None}
        self._peer.regularize(self._model)
        for p, gradient in before.items():
            p.grad = torch.where(p.grad.isfinite(), p.grad, gradient)  # type: ignore[union-attr]

    def _follow(self) -> None:
        super()._follow()
        self._peer.update_regularizer()
        if self.finished:
            for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
                group["weight_decay"] = decay
