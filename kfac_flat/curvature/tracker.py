"""rho of a whole model and its gradient, followed from batch to batch.

The eigenvectors of every layer live here, one step of power iteration per batch keeps them close to the top ones, and
the layer that attains the maximum is known from the batch before, so that nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kfac_flat.changes import Change, setting
from kfac_flat.curvature.layers import Layer
from kfac_flat.curvature.radius import (
    Eigenvectors,
    LayerData,
    eigenvalues,
    factors,
    factors_times,
    input_mask_gradient,
    product_rule,
    top_eigenvectors,
)
from kfac_flat.curvature.twin import BACKPACK, Conditions, Twin, UnreadableError, layer_shape, quiet_hooks
from kfac_flat.structure import Kept

# Power steps on the very first batch, from random vectors; afterwards one per batch tracks the moving eigenvectors.
_FIRST_STEPS = 20

# Two numbers or vectors per layer, of A and of G.
Pairs: TypeAlias = dict[str, tuple[Tensor, Tensor]]

# The mean over several processes of tensors that each of them has from its own number of examples.
Average: TypeAlias = Callable[[Sequence[Tensor], int], list[Tensor]]

# What a gradient of rho is multiplied by, given rho. Multiplied afterwards, it would be read and written once more.
Scale: TypeAlias = Callable[[Tensor], Tensor]

# How a parameter is cut, done to a tensor of its shape; and how a tensor cut like that is put together again.
Select: TypeAlias = Callable[[nn.Parameter, Tensor], Tensor]
Join: TypeAlias = Callable[[nn.Parameter, Tensor], Callable[[Tensor], Tensor]]


def alone(tensors: Sequence[Tensor], examples: int) -> list[Tensor]:
    """Average over the one process there is."""
    return list(tensors)


@dataclass(frozen=True)
class RadiusGradient:
    """rho, the sum or maximum over layers, and its derivatives.

    Attributes:
        rho: A scalar without a graph.
        parameters: d rho / d p by parameter, for those that rho depends on; scaled if that was asked for.
        input_masks: For each layer that rho depends on, by name, d rho / d m through its A, ``[C_in]``.
        scaled: Whether the gradients at the parameters have been multiplied with a scale.
    """

    rho: Tensor
    parameters: dict[nn.Parameter, Tensor]
    input_masks: dict[str, Tensor]
    scaled: bool


class Tracker(Protocol):
    """Follows a rho from batch to batch: what :class:`kfac_flat.FlatKFAC` asks for.

    Attributes:
        radii: The radii that rho is made of, as last seen, by name.
        skipped: Layers that take no part in it, by name, and why.
    """

    radii: dict[str, Tensor]
    skipped: dict[str, str]

    def rho(self) -> Tensor | None:
        """Return rho as last seen, a scalar; None before the first batch."""

    def gradient(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        parameters: Sequence[nn.Parameter],
        conditions: Conditions,
        *,
        survey: bool,
        scale: Scale | None,
    ) -> RadiusGradient:
        """Differentiate rho on a batch; ``survey`` asks to look at all that it may depend on."""

    def output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], conditions: Conditions, *, graph: bool) -> Any:
        """Return what the copy of the model that is read gives, to be compared with what the model gave."""

    def prepare_cut(self, kept: Mapping[str, Kept], select: Select) -> list[Change]:
        """Work out what a cut that is still to come leaves of what is known."""

    def keep_removed(self, kept: Mapping[str, Kept], join: Join) -> Callable[[], list[Change]]:
        """Remember what a cut that is still to come takes; returns a function that prepares to put it back."""

    def reset(self) -> None:
        """Forget everything seen."""

    def state_dict(self) -> dict[str, Any]:
        """What is known, as plain tensors and numbers."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that :meth:`load_state_dict` can load this; a ValueError says why not."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class HostCopy:
    """The value that a device tensor had a while ago, readable without stopping the device."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        """Start copying; the program goes on at once."""
        if value.device.type != "cuda":
            self._value = value.detach().to("cpu", copy=True)
            return
        if self._value is None or self._value.shape != value.shape:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._value.copy_(value.detach(), non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(value.device))

    def get(self) -> Tensor | None:
        """Return the last value put; waits for its copy alone, which has long been made when a step lies between."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value

    def peek(self) -> Tensor | None:
        """Return the last value put if it has arrived, without waiting for it."""
        arrived = self._copied is None or self._copied.query()  # type: ignore[no-untyped-call]
        return self._value if arrived else None


class RadiusTracker:
    """Follows rho_l of a model's layers.

    Args:
        model: The user's model, free of wrappers.
        names: Names of the Linear and Conv2d modules to follow.
        reduction: ``"max"``, rho = max_l rho_l [HGNP eq. 3], or ``"sum"``, rho = sum_l rho_l.
        exact: Form the factors and decompose them at every batch instead of tracking eigenvectors.
        seed: Of the starting vectors.
        skipped: Other layers, by name, and why they are not followed.
        average: Where several processes see parts of one batch: their mean. All of them must make the same calls.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        reduction: str,
        exact: bool,
        seed: int,
        skipped: Mapping[str, str] | None = None,
        average: Average = alone,
    ) -> None:
        self._model = model
        self._reduction = reduction
        self._exact = exact
        self._seed = seed
        self._average = average
        self._twin: Twin | None = None
        self._checked: set[str] = set()  # layers known to have a second derivative
        self._host_radii, self._host_names = HostCopy(), list[str]()
        self.names, self._order = list(names), list(names)
        self.skipped = dict(skipped or {})
        self.eigenvectors: dict[str, Eigenvectors] = {}
        self.radii: dict[str, Tensor] = {}
        self._outdated = False  # whether the layers have been cut since all of them were read

    def rho(self) -> Tensor | None:
        """Return rho as last seen, a scalar; None before the first batch."""
        if not self.radii:
            return None
        radii = torch.stack([r.double() for r in self.radii.values()])
        return radii.max() if self._reduction == "max" else radii.sum()

    def measure(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        conditions: Conditions = contextlib.nullcontext,
        steps: int = _FIRST_STEPS,
    ) -> None:
        """Bring eigenvectors and radii up to date on a batch, with several power steps and no gradient of rho."""
        seen = self._read(args, kwargs, loss, conditions, create_graph=False)
        vectors = self._next_vectors(seen, steps)
        values = self._averaged({name: eigenvalues(data, vectors[name]) for name, data in seen.items()}, seen)
        self._publish(vectors, {name: (of_A * of_G).max() for name, (of_A, of_G) in values.items()})

    def gradient(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        parameters: Sequence[nn.Parameter],
        conditions: Conditions = contextlib.nullcontext,
        *,
        survey: bool = True,
        scale: Scale | None = None,
    ) -> RadiusGradient:
        """Differentiate rho on a batch, bringing eigenvectors and radii up to date on the way.

        Args:
            args: Positional arguments of the model's forward.
            kwargs: Keyword arguments of it.
            loss: From the model's output to the losses of the examples, ``[N]``, or to their sum, a scalar. Called for
                each pass over the batch, of which there may be several; random labels should be the same in all.
            parameters: What to differentiate with respect to.
            conditions: Makes the context, of randomness and precision, that each forward pass runs in.
            survey: Whether to read all layers, as happens anyway where some are not known or have been cut. If not,
                only those that rho is known to depend on are read, which costs less the closer they are to the loss.
            scale: What the gradient at the parameters is multiplied by, given rho; None for 1.

        Raises:
            RuntimeError: if the loss depends on none of the layers.
        """
        if not self._host_names:
            self.measure(args, kwargs, loss, conditions)
        survey |= self._reduction == "sum" or self._outdated or any(map(math.isnan, self._known_radii().values()))
        only = None if survey else self._active(self.names)
        seen = self._read(args, kwargs, loss, conditions, create_graph=True, only=only)
        survey = only is None or not seen.keys() <= only  # all have been read where those known take no part
        active = self._active(seen)
        vectors = self._next_vectors(seen, steps=1)
        of_batch = {n: eigenvalues(data if n in active else data.detach(), vectors[n]) for n, data in seen.items()}
        at = self._averaged(of_batch, seen)
        of_active = {name: product_rule(of_batch[name], at[name]) for name in active}
        constant = [name for name in active - self._checked if _is_wrongly_constant(of_active[name])]
        if constant:
            self._leave_out(constant, "followed by something marked with @once_differentiable: no second derivative")
            return self.gradient(args, kwargs, loss, parameters, conditions, scale=scale)
        self._checked |= active
        rho = torch.stack(list(of_active.values())).sum()
        radii = {name: of_A * of_G for name, (of_A, of_G) in at.items()}
        total = torch.stack([radii[name].max() for name in active]).sum()
        try:
            gradients = _differentiate(rho, parameters, None if scale is None else scale(total))
        except RuntimeError as error:
            if not _tells_of_no_derivative(error):
                raise
            if len(active) > 1:  # not all of them need be at fault
                seen = self._read(args, kwargs, loss, conditions, create_graph=True)
                again = {n: product_rule(eigenvalues(seen[n], vectors[n]), at[n]) for n in active}
                active = {name for name in active if not _has_derivative(again[name], parameters)}
            self._leave_out(active, f"followed by something that has no second derivative: {error}")
            return self.gradient(args, kwargs, loss, parameters, conditions, scale=scale)
        self._publish(vectors, {name: of_groups.max() for name, of_groups in radii.items()}, all_layers=survey)
        masks = {name: input_mask_gradient(seen[name].layer, radii[name], vectors[name]) for name in active}
        averaged = self._average(list(gradients.values()), _examples(seen))
        return RadiusGradient(total, dict(zip(gradients, averaged, strict=True)), masks, scale is not None)

    def output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], conditions: Conditions, *, graph: bool) -> Any:
        """Return what the copy of the model that is read gives, to be compared with what the model gave."""
        return self._current_twin().output(args, kwargs, conditions, graph=graph)

    def prepare_cut(self, kept: Mapping[str, Kept], select: Select) -> list[Change]:
        """Work out what a cut that is still to come leaves of the eigenvectors; all radii will have to be seen anew."""
        vectors = {
            name: v.index_select(self._layer(name), kept[name]) if name in kept else v
            for name, v in self.eigenvectors.items()
        }
        return [setting(self, {"eigenvectors": vectors, "_outdated": True})]

    def keep_removed(self, kept: Mapping[str, Kept], join: Join) -> Callable[[], list[Change]]:
        """Remember what a cut that is still to come takes of the eigenvectors, to be put back."""
        before, radii, outdated = self.eigenvectors, self.radii, self._outdated

        def put_back() -> list[Change]:
            now = {name: v for name, v in self.eigenvectors.items() if name not in kept or name in before}
            vectors = {
                name: before[name].joined_to(v, self._layer(name), kept[name]) if name in kept else v
                for name, v in now.items()
            }
            still_outdated = outdated or self.radii is not radii  # unless nothing has been read in between
            return [setting(self, {"eigenvectors": vectors, "_outdated": still_outdated})]

        return put_back

    def reset(self) -> None:
        """Forget everything seen."""
        self.eigenvectors, self.radii, self._host_names, self._outdated = {}, {}, [], False

    def state_dict(self) -> dict[str, Any]:
        """Eigenvectors and radii as plain tensors, and whether there has been a cut since."""
        return {
            "eigenvectors": {name: {"A": v.A, "G": v.G} for name, v in self.eigenvectors.items()},
            "radii": dict(self.radii),
            "outdated": self._outdated,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that :meth:`load_state_dict` can load this.

        Raises:
            ValueError: if a layer is unknown or has another shape.
        """
        for name, v in state["eigenvectors"].items():
            if name not in self._order:
                raise ValueError(
                    f"the checkpoint follows a layer {name!r} that this optimizer does not: make it for the same "
                    "model, with the same layers="
                )
            if not Eigenvectors(v["A"], v["G"]).fits(self._layer(name)):
                raise ValueError(
                    f"layer {name!r} has another shape than in the checkpoint: "
                    "load the pruner's state into the dense model first, then the optimizer's"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        device = next(self._model.parameters()).device
        vectors = {
            name: Eigenvectors(v["A"].to(device, copy=True), v["G"].to(device, copy=True))
            for name, v in state["eigenvectors"].items()
        }
        self._publish(vectors, {name: r.to(device, copy=True) for name, r in state["radii"].items()})
        self._outdated = state.get("outdated", True)  # older checkpoints do not say

    def _layer(self, name: str) -> Layer:
        return layer_shape(self._model, name)

    def _read(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], Tensor],
        conditions: Conditions,
        *,
        create_graph: bool,
        only: Collection[str] | None = None,
    ) -> dict[str, LayerData]:
        """Read the twin; layers that have no single call are left out.

        Where none of ``only`` takes part, all layers are read.
        """
        twin = self._current_twin()
        try:
            seen = twin.read(args, kwargs, loss, create_graph=create_graph, only=only, conditions=conditions)
        except UnreadableError as error:
            names = [name for name, layer in twin.layers.items() if layer is error.layer]
            self._leave_out(names, str(error))
            return self._read(args, kwargs, loss, conditions, create_graph=create_graph)
        unbatched = [
            name for name, data in seen.items() if data.a.dim() < (4 if isinstance(data.layer, nn.Conv2d) else 2)
        ]
        if unbatched:
            self._leave_out(unbatched, "called without an axis of examples")
            return self._read(args, kwargs, loss, conditions, create_graph=create_graph)
        if not seen and only is not None:
            return self._read(args, kwargs, loss, conditions, create_graph=create_graph)
        if not seen:
            skipped = "".join(f"; {n} is {self.skipped[n]}" for n in self._order if n in self.skipped)
            raise RuntimeError(
                "the curvature's loss depends on none of the layers that are followed "
                f"({', '.join(self.names) or 'none left'}): are they frozen, or unused in this forward pass?{skipped}"
            )
        return seen

    def _current_twin(self) -> Twin:
        """Return the twin, made anew where the model has changed."""
        twin = Twin.current(self._twin, self._model, self.names)
        if twin is not self._twin:
            self._twin, self._checked = twin, set()
        return twin

    def _leave_out(self, names: Iterable[str], reason: str) -> None:
        """Follow these layers no longer."""
        for name in names:
            self.skipped[name] = reason
            self.names.remove(name)
            self.eigenvectors.pop(name, None)
            self.radii.pop(name, None)
        self._twin = None

    def _known_radii(self) -> dict[str, float]:
        """Radii of the batch before, which are on the host by now; NaN where they have never been finite."""
        known = self._host_radii.get() if self._host_names else None
        return {} if known is None else dict(zip(self._host_names, known.tolist(), strict=True))

    def _active(self, seen: Iterable[str]) -> set[str]:
        """Layers that rho depends on, as known from the batch before."""
        if self._reduction == "sum":
            return set(seen)
        known = {name: value for name, value in self._known_radii().items() if not math.isnan(value)}
        return {max(seen, key=lambda name: known.get(name, 0.0))}

    def _next_vectors(self, seen: Mapping[str, LayerData], steps: int) -> dict[str, Eigenvectors]:
        """Return the eigenvectors for this batch; those kept stay as they are until all is known to go well."""
        if self._exact:
            formed = self._averaged({name: factors(data) for name, data in seen.items()}, seen)
            return {name: top_eigenvectors(A, G) for name, (A, G) in formed.items()}
        vectors = {name: self._known_vectors(name, data) for name, data in seen.items()}
        for _ in range(steps):
            moved = self._averaged({n: factors_times(data, vectors[n]) for n, data in seen.items()}, seen)
            vectors = {name: v.towards(*moved[name]) for name, v in vectors.items()}
        return vectors

    def _known_vectors(self, name: str, data: LayerData) -> Eigenvectors:
        """Return where a layer's eigenvectors were seen last, random ones where nowhere."""
        kept = self.eigenvectors.get(name)
        if kept is None or not kept.fits(data.layer):
            kept = Eigenvectors.random(data.layer, self._seed_of(name))
        return kept.to(data.a)

    def _averaged(self, pairs: Pairs, seen: Mapping[str, LayerData]) -> Pairs:
        """Average what is known of each layer over the processes; no graph."""
        values = self._average([value.detach() for pair in pairs.values() for value in pair], _examples(seen))
        return dict(zip(pairs, zip(values[::2], values[1::2], strict=True), strict=True))

    def _seed_of(self, name: str) -> torch.Generator:
        """Seed a layer's starting vectors by its place, so that they do not depend on which layers came first."""
        return torch.Generator().manual_seed((self._seed + self._order.index(name)) % 2**63)

    def _publish(
        self, vectors: Mapping[str, Eigenvectors], radii: Mapping[str, Tensor], *, all_layers: bool = True
    ) -> None:
        """Take over what a batch has shown, all at once; radii that are not finite stay as they were."""
        self.eigenvectors = {**self.eigenvectors, **vectors}
        before = self.radii
        self.radii = {} if all_layers else dict(before)  # a layer that takes no part is no part of rho
        self._outdated &= not all_layers
        for name, rho_l in radii.items():
            seen = rho_l.detach()
            known = before[name].to(seen) if name in before else torch.full_like(seen, math.nan)
            self.radii[name] = torch.where(seen.isfinite(), seen, known)
        if self.radii:
            self._host_names = list(self.radii)
            self._host_radii.put(torch.stack([r.double() for r in self.radii.values()]))


def _examples(seen: Mapping[str, LayerData]) -> int:
    """Size of the batch."""
    return next(iter(seen.values())).batch_size


def _differentiate(
    rho: Tensor, parameters: Sequence[nn.Parameter], scale: Tensor | None = None, again: bool = False
) -> dict[nn.Parameter, Tensor]:
    """Return scale * d rho / d p by parameter, for those that rho depends on; ``again`` keeps the graph."""
    if not rho.requires_grad:
        return {}
    with BACKPACK, quiet_hooks():
        gradients = torch.autograd.grad(rho, parameters, scale, allow_unused=True, retain_graph=again)
    return {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}


def _has_derivative(rho: Tensor, parameters: Sequence[nn.Parameter]) -> bool:
    """Tell whether everything between the parameters and rho can be differentiated twice."""
    try:
        _differentiate(rho, parameters, again=True)
    except RuntimeError as error:
        if not _tells_of_no_derivative(error):
            raise
        return False
    return True


def _is_wrongly_constant(radius: Tensor) -> bool:
    """Tell whether the graph has a dead end where a gradient was taken that cannot be differentiated.

    torch puts an error there, which nobody runs into who asks for the gradient at certain parameters.
    """
    seen, left = set[Any](), [radius.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        left.extend(following for following, _ in node.next_functions)
    return False


def _tells_of_no_derivative(error: RuntimeError) -> bool:
    """Recognise torch's complaint of an operation that can be differentiated once only."""
    return "derivative" in str(error) and "not implemented" in str(error)
