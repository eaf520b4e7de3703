"""Taylor pruning: neurons go whose removal changes the loss least, to first order.

Two criteria: that of feature maps, example by example [Molchanov et al. 2017, arXiv 1611.06440], and that of gates
[Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from baselines.reading import FeatureMapPruner, FeatureMaps
from kfac_flat import NeuronPruner
from kfac_flat.pruning.budget import Ranking
from kfac_flat.pruning.costs import Costs
from kfac_flat.pruning.saliency import Saliency


@dataclass
class Pass:
    """What the backward pass of one forward pass has told.

    Attributes:
        examples: How many it ran on, N.
        effects: Sum over a group's entries of ``dl_n/dz z``, ``[examples, groups + 1]``, the last for what stays.
        entries: M, entries of the group's feature map for each example, ``[groups + 1]``.
    """

    examples: int
    effects: Tensor
    entries: Tensor


class FirstOrderEffects(FeatureMaps):
    """Mean over examples of ``|1/M sum_m dl_n/dz_nm z_nm|``, over all backward passes since the last removal.

    Every channel that a layer reads goes through a gate of one, one for each example. The loss's gradient at the gate
    is that sum over the channel's entries, as far as this layer is concerned; layers that read the same map add up.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._examples = 0
        self._passes: list[Pass] = []
        self._current: Pass | None = None

    def begin(self, examples: int) -> None:
        """Count what is read from now on as one forward pass."""
        self._examples, self._current = examples, None

    def look(self, name: str, x: Tensor, axis: int) -> Tensor:
        """Put a gate on each channel of each example."""
        if not axis or len(x) != self._examples:
            raise ValueError(
                f"{name} reads {list(x.shape)}, and the model was called with {self._examples} examples: Taylor's "
                "criterion needs them along the first axis of what layers read. Name the layers before it in ignore="
            )
        if self._current is None:
            shape = len(x), len(self.total) + 1
            self._current = Pass(len(x), x.new_zeros(shape, dtype=torch.float32), self.total.new_zeros(shape[1]))
        entries = torch.full_like(self._slots[name], x.numel() // (len(x) * x.shape[axis]), dtype=self.total.dtype)
        read = torch.zeros_like(self._current.entries).index_add_(0, self._slots[name], entries)
        self._current.entries = torch.maximum(self._current.entries, read)
        gate = x.new_ones([size if i in (0, axis) else 1 for i, size in enumerate(x.shape)]).requires_grad_()
        gate.register_hook(partial(self._add, self._current, name))  # type: ignore[no-untyped-call]
        return x * gate

    def _add(self, own: Pass, name: str, gradient: Tensor) -> None:
        """Add what has reached the gates of a layer."""
        if not any(known is own for known in self._passes):
            self._passes.append(own)
        by_channel = gradient.detach().flatten(1).float() * own.examples  # the loss is a mean over them
        own.effects.index_add_(1, self._slots[name], by_channel)
        self._without_gradient.discard(name)

    @torch.no_grad()
    def record(self, direct: Mapping[nn.Parameter, Tensor], scale: Tensor | None = None) -> None:
        """Add the backward passes since the optimizer's last step; one that is not finite is left out."""
        for own in self._passes:
            effects = (own.effects / own.entries.clamp(min=1))[:, :-1].abs().sum(0)
            finite = effects.isfinite().all()
            self.total += torch.where(finite, effects if scale is None else effects / scale, 0.0)
            self.steps += finite * own.examples
        self._passes = []


class TaylorPruner(FeatureMapPruner):
    """Score a group of neurons by the first-order effect of its feature map on each example's loss [arXiv 1611.06440].

    ``Theta = mean_n |1/M sum_m dl_n/dz_nm z_nm|`` (eq. 8), z the map as the next layers read it, after the activation;
    divided by the l2 norm of the scores in the same layers (sec. 2.2), less ``flops_weight`` times the FLOPs that go
    with the group (eq. 11), in millions, since the paper gives no unit. Pooling between the activation and the reader
    changes M for the whole layer alike and nothing else, which the norm takes out again.

    The loss is taken to be a mean over the batch, whose examples lie along the first axis. Of another loss, or under a
    gradient scaler, all scores have a common factor, which the norm takes out as well.

    The paper trains to the end and then removes one neuron every so many updates: with ``neurons_per_event=1`` and
    ``start=1``, call ``step()`` for the first time when training is over, and from then on after every so many updates;
    or give the last epoch as ``start`` and call it once an epoch, as usual.

    Args:
        arguments: As of NeuronPruner.
        flops_weight: lambda of the FLOPs term; the paper's is 1e-3.
        normalize: The norm, as of NeuronPruner; "l2" in the paper.
        options: As of NeuronPruner.

    Raises:
        ValueError: if ``flops_weight`` is negative; besides, as NeuronPruner does.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = TaylorPruner(
        ...     model, optimizer, torch.randn(1, 4), target=0.5, neurons_per_event=1, start=1, flops_weight=1e-3
        ... )
        >>> for _ in range(4):
        ...     nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        ...     optimizer.step()
        ...     print(pruner.step().widths_after["0"])
        7
        6
        5
        4
    """

    _criterion = FirstOrderEffects

    def __init__(
        self, *arguments: Any, flops_weight: float = 0.0, normalize: str | None = "l2", **options: Any
    ) -> None:
        if not flops_weight >= 0:
            raise ValueError(f"flops_weight={flops_weight!r} must be a number >= 0")
        Ranking(normalize=normalize)  # refuses what it does not know
        self._flops_weight, self._norm = flops_weight, normalize
        super().__init__(*arguments, **options)

    def _scores(self) -> list[float] | None:
        scores = super()._scores()
        if scores is None:
            return None
        effects = torch.tensor(scores, dtype=torch.float64)
        if self._norm is not None:  # here, and not where groups compete, since FLOPs are taken off afterwards
            effects = self._groups.normalised(effects, self._norm)
        _, macs = Costs(self._model, self._channels, self._graph.positions).of_each(self._groups.ids)
        return (effects - self._flops_weight * 2e-6 * macs).tolist()


class SquaredGates(Saliency):
    """Mean over the optimizer's steps of the squared gradient at each group's gate."""

    def effect(self, gradients: Tensor) -> Tensor:
        """Square the gradients, ``[groups]``."""
        return gradients.square()


class GateTaylorPruner(NeuronPruner):
    """Score a group of neurons by the squared gradient at a gate on its output [arXiv 1906.10771, eq. 8 at a gate].

    The gate multiplies what layers read of the group, behind BatchNorm and activation; one behind BatchNorm and in
    front of a ReLU, where the paper has it, has the same gradient, and layers tied by an addition share one, as there.
    Its gradient is read from weights and their gradients as in NeuronPruner, which is the same criterion without the
    square, batch by batch. The paper's moving average from one removal to the next is left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = GateTaylorPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, every=1, events=1)
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    _criterion = SquaredGates
