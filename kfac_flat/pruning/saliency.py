"""Theta: the first-order effect of removing each group of neurons, from weights and gradients alone.

A neuron is gone exactly when no layer reads it any more, so let a mask m_i multiply it where layers read it. Then

    d objective / d m_i  =  sum over reading layers of  <W[:, i], d objective / d W[:, i]>

and, for the penalty, the direct dependence of rho on m_i through A [HGNP eq. 5-6, written with weights].
Theta_i is its absolute value, averaged over optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfac_flat.pruning import layers

# Entries that a processor holds close to itself.
_IN_CACHE = 2**16


def mask_gradient(weight: Tensor, gradient: Tensor, groups: int = 1) -> Tensor:
    """Gradient of the loss at masks on a layer's inputs: weight times gradient, summed over what reads each channel.

    Args:
        weight: ``[C_out, C_in / groups, *kernel]``.
        gradient: The loss's gradient with respect to it, same shape.
        groups: Groups of the convolution.

    Returns:
        ``[C_in]``.
    """
    shape = (groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))
    w, g = weight.detach().reshape(shape), gradient.reshape(shape)
    rows = w.shape[1] if w.device.type != "cpu" else max(1, _IN_CACHE * w.shape[1] // max(1, w.numel()))
    # Multiplied and added up block by block, nothing as large as the weight has to go to memory and back.
    dtype = torch.promote_types(torch.result_type(w, g), torch.float32)
    total = w.new_zeros((groups, min(rows, w.shape[1]), *w.shape[2:]), dtype=dtype)
    for some_w, some_g in zip(torch.split(w, rows, 1), torch.split(g, rows, 1), strict=True):
        total[:, : some_w.shape[1]].addcmul_(some_w, some_g)
    return total.sum(1).sum(-1).flatten()  # one axis after the other: twice as fast


def input_mask_gradient(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Gradient at masks on a layer's inputs, ``[C_in]``, of what has this gradient with respect to its weight."""
    weight = layers.weight_of(layer)
    if isinstance(layer, layers.TRANSPOSED):  # [C_in, C_out, *kernel]
        return mask_gradient(weight.transpose(0, 1), gradient.transpose(0, 1))
    return mask_gradient(weight, gradient, int(getattr(layer, "groups", 1)))


class Saliency:
    """Running mean of Theta over optimizer steps.

    Subclasses measure something else: another :meth:`effect` of the same gradients, or, with a ``record`` of their own,
    a mean ``total / steps`` of whatever they collect between the steps.

    Args:
        consumers: Modules that read neurons, by name.
        inputs: For each of them the group that each of its input channels belongs to.
        ids: The groups that are scored, ascending.

    Attributes:
        every_step: Whether :meth:`record` has to be called at every step; otherwise some do.
    """

    every_step: ClassVar[bool] = False

    def __init__(self, consumers: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], ids: Tensor) -> None:
        self._consumers = consumers
        # Channels that cannot go are summed up in one place more than there are groups, and forgotten.
        self._slots = {name: places(ids, inputs[name]) for name in consumers}
        self._readers = {name: torch.unique(slots[slots < len(ids)]) for name, slots in self._slots.items()}
        self._without_gradient = {name for name, slots in self._readers.items() if len(slots)}
        self.total = torch.zeros(len(ids))
        self.steps = torch.zeros(())

    def fits(self) -> bool:
        """Tell whether the layers that are scored read as many channels as they did."""
        return all(
            layers.channel_counts(module)[0] == len(self._slots[name]) for name, module in self._consumers.items()
        )

    @torch.no_grad()
    def record(self, direct: Mapping[nn.Parameter, Tensor], scale: Tensor | None = None) -> None:
        """Add one step, whose gradients are in place; a step with gradients that are not finite is left out.

        Args:
            direct: Gradient at the input masks beyond weight times gradient, by the layer's weight, ``[C_in]``.
            scale: What the gradients in place have been multiplied with, if anything.
        """
        scored = [(n, m) for n, m in self._consumers.items() if len(self._readers[n])]  # the first reads no neurons
        weights: dict[str, nn.Parameter] = {name: layers.weight_of(module) for name, module in scored}
        with_gradient = {
            w: name for name, w in weights.items() if w.grad is not None
        }  # one name where several share it
        self._without_gradient -= {name for name, w in weights.items() if w in with_gradient}
        self._move_to(next((w.device for w in with_gradient), self.total.device))
        theta = torch.zeros(len(self.total) + 1, device=self.total.device)
        for weight, name in with_gradient.items():
            assert weight.grad is not None
            contribution = input_mask_gradient(self._consumers[name], weight.grad)
            if scale is not None:
                contribution = contribution / scale
            if weight in direct:
                contribution = contribution + direct[weight]
            theta.index_add_(0, self._slots[name], contribution.to(theta.dtype))
        finite = theta.isfinite().all()
        self.total += torch.where(finite, self.effect(theta[:-1]), 0.0)
        self.steps += finite

    def effect(self, gradients: Tensor) -> Tensor:
        """How much a step's gradients at the groups' masks count, ``[groups]``: their absolute values."""
        return gradients.abs()

    def _move_to(self, device: torch.device) -> None:
        """Follow the model to another device."""
        if self.total.device != device:
            self.total, self.steps = self.total.to(device), self.steps.to(device)
            self._slots = {name: slots.to(device) for name, slots in self._slots.items()}

    def scores(self) -> list[float] | None:
        """Theta of each group; infinite where a layer that reads it had no gradient; None before the first step."""
        if not self.steps.any():
            return None
        theta = self.total / self.steps.clamp(min=1)
        for name in self._without_gradient:
            theta[self._readers[name].to(theta.device)] = torch.inf
        scores: list[float] = theta.tolist()
        return scores

    def state_dict(self) -> dict[str, object]:
        """Plain tensors and names."""
        return {
            "total": self.total.clone(),
            "steps": self.steps.clone(),
            "without_gradient": sorted(self._without_gradient),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave for the same groups.

        Raises:
            ValueError: if it was given for another number of groups.
        """
        if len(state["total"]) != len(self.total):  # type: ignore[arg-type]
            raise ValueError(
                "the state's saliency belongs to another number of groups than this model has: make the pruner as it "
                "was made for the run that is resumed, with the same ignore= and for a model with the same forward "
                "hooks"
            )
        self.total.copy_(state["total"])  # type: ignore[arg-type]
        self.steps.copy_(state["steps"])  # type: ignore[arg-type]
        self._without_gradient = set(state["without_gradient"])  # type: ignore[call-overload]


def places(ids: Tensor, channels: Tensor) -> Tensor:
    """Place of each channel's group among ``ids``, one past the end where it is not among them."""
    if not len(ids):
        return torch.zeros_like(channels)
    places = torch.searchsorted(ids, channels).clamp(max=len(ids) - 1)
    return torch.where(ids[places] == channels, places, len(ids))
