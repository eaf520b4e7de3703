"""Weight pruning: single weights become zero and stay so [Han et al., arXiv 1506.02626; Zhu & Gupta, 1710.01878].

The tensors stay as large as they were, so nothing becomes faster where zeros are multiplied like other numbers: this is
what the inference tables compare removed neurons with.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat.pruning import layers
from kfac_flat.pruning.budget import Schedule
from kfac_flat.pruning.checks import check_kinds, check_shared, ignored
from kfac_flat.structure import unwrap


@dataclass(frozen=True)
class WeightReport:
    """What :meth:`~baselines.weight.WeightPruner.step` has done.

    Attributes:
        epoch: The epoch that it ended, from 1.
        removed: Weights that became zero, by the name of the parameter.
        sparsity: Share of the weights that are zero now.
        reason: Why nothing went; empty if something did.
    """

    epoch: int
    removed: dict[str, int]
    sparsity: float
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.removed)


class WeightPruner(ABC):
    """Set the weights that matter least to zero, and keep them there while training goes on.

    Weights are those of Linear and convolution layers, biases not counted; those of all layers compete. After each step
    of the optimizer, and after :meth:`step`, weights that have gone are zero, whatever momentum and weight decay do.

    Args:
        model: The model being trained; wrapped by ``torch.compile`` if you like.
        optimizer: Any torch optimizer over its parameters.
        target: Share of the weights to remove in the end, in (0, 1).
        start: Epochs of training before the first removal.
        every: Epochs from one removal to the next.
        events: Number of removals.
        pace: How the target is divided among the events: "cubic", more at first, or "linear".
        ignore: Layers whose weights stay: names (shell patterns allowed) or classes.

    Attributes:
        masks: For each pruned parameter, by name, whether a weight is left, bool, of the parameter's shape.
        history: The reports of all :meth:`step` calls of this object, oldest first.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another kind.
        ValueError: if an option is out of range, or the model has no weights to remove.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        target: float,
        start: int = 5,
        every: int = 1,
        events: int = 10,
        pace: str = "cubic",
        ignore: Any = (),
    ) -> None:
        check_kinds(model, optimizer)
        if not 0 < target < 1:
            raise ValueError(f"target={target!r} must lie strictly between 0 and 1")
        self._model, self._optimizer = unwrap(model), optimizer
        check_shared(self._model, optimizer)
        self._target, self._schedule = target, Schedule(start, every, events, pace)
        self._weights = prunable_weights(self._model, set(ignored(self._model, ignore)))
        if not self._weights:
            raise ValueError("the model has no weights to remove: no Linear or convolution that is not ignored")
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights.items()}
        self._epoch = self._event = 0
        self.history: list[WeightReport] = []
        self._attach()

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Say how much each weight matters, of the parameters' shapes, by name; only their order counts."""

    # ---------------------------------------------------------------- reading

    @property
    def sparsity(self) -> float:
        """Share of the weights that have gone."""
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / self._total

    @property
    def progress(self) -> float:
        """Share of the weights that have gone, ``target`` in the end: here, sparsity is all there is."""
        return self.sparsity

    @property
    def finished(self) -> bool:
        """Whether all events have passed."""
        return self._event >= self._schedule.events

    def sparsities(self) -> dict[str, float]:
        """Share of the weights of each parameter that have gone, by its name."""
        return {name: 1 - float(mask.double().mean()) for name, mask in self.masks.items()}

    @property
    def _total(self) -> int:
        return sum(m.numel() for m in self.masks.values())

    # ---------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self) -> WeightReport:
        """End an epoch: remove weights if the schedule says so, and report."""
        self._epoch += 1
        removed, reason = dict[str, int](), ""
        if self.finished:
            reason = "finished: all events have passed"
        elif not self._schedule.is_due(self._epoch):
            reason = f"the schedule has no removal at the end of epoch {self._epoch}"
        else:
            self._event += 1
            masks = self._smaller(round(self._target * self._schedule.share(self._event) * self._total))
            lost = {name: int(mask.sum() - masks[name].sum()) for name, mask in self.masks.items()}
            removed = {name: count for name, count in lost.items() if count}
            self.masks = masks
            self.apply()
        report = WeightReport(self._epoch, removed, self.sparsity, reason)
        self.history.append(report)
        return report

    @torch.no_grad()
    def apply(self) -> None:
        """Set the weights that have gone to zero; done after each step of the optimizer."""
        for name, weight in self._weights.items():
            weight.masked_fill_(~self.masks[name], 0)

    def _smaller(self, gone: int) -> dict[str, Tensor]:
        """Return masks under which that many weights have gone, the least ones; of equals, the first."""
        scores = self.scores()
        flat = torch.cat([scores[name].detach().double().flatten().cpu() for name in self._weights])
        left = torch.cat([self.masks[name].flatten().cpu() for name in self._weights])
        order = torch.where(left, flat, -torch.inf).argsort(stable=True)  # what has gone does not come back
        left = torch.ones_like(left)
        left[order[:gone]] = False
        masks = {}
        for name, weight in self._weights.items():
            masks[name], left = left[: weight.numel()].reshape(weight.shape).to(weight.device), left[weight.numel() :]
        return masks

    def _attach(self) -> None:
        """Apply the masks after each step of the optimizer, while this object lives."""
        reference = weakref.ref(self)

        def apply(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            alive = reference()
            if alive is not None:
                alive.apply()

        weakref.finalize(self, self._optimizer.register_step_post_hook(apply).remove)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()  # a copied optimizer has no hooks

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, plain tensors and numbers."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return {"masks": masks, "epoch": self._epoch, "event": self._event}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state, and remove from the model's weights what had gone.

        Raises:
            ValueError: if it belongs to another model; nothing has changed.
        """
        masks = state_dict["masks"]
        shapes = {name: mask.shape for name, mask in masks.items()}
        if shapes != {name: w.shape for name, w in self._weights.items()}:
            raise ValueError(
                "the state belongs to another model: its masks fit other weights. Load it with the same ignore="
            )
        self.masks = {name: masks[name].to(w.device, copy=True) for name, w in self._weights.items()}
        self._epoch, self._event = state_dict["epoch"], state_dict["event"]
        self.apply()


class MagnitudeWeightPruner(WeightPruner):
    """Remove the weights with the smallest absolute value; all else is as in :class:`~baselines.weight.WeightPruner`.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, -1.0, 2.0]]))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = MagnitudeWeightPruner(model, optimizer, target=1 / 3, start=1, events=1)
        >>> pruner.step().removed, model.weight.tolist()
        ({'weight': 1}, [[3.0, 0.0, 2.0]])
    """

    def scores(self) -> dict[str, Tensor]:
        """Absolute values."""
        return {name: w.detach().abs() for name, w in self._weights.items()}


def prunable_weights(model: nn.Module, ignore: set[str]) -> dict[str, nn.Parameter]:
    """Weights of the Linear and convolution layers that are not ignored, by name, each parameter once."""
    found: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if layers.is_producer(module) and name not in ignore and layers.weight_of(module).requires_grad:
            weight = layers.weight_of(module)
            own = next(n for n, p in module.named_parameters(recurse=False) if p is weight)
            found.setdefault(weight, f"{name}.{own}" if name else own)
    return {name: weight for weight, name in found.items()}
