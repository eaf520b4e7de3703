"""NeuronPruner: stepped once an epoch like a learning-rate scheduler, it makes the model smaller."""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat.changes import Change, appending, make_all, setting, truncating
from kfac_flat.pruning import rules
from kfac_flat.pruning.budget import Groups, Schedule
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.graph import Channels, NeuronGraph, kept_without, without
from kfac_flat.pruning.report import PruneReport, Size
from kfac_flat.pruning.saliency import Saliency
from kfac_flat.pruning.surgery import Surgery
from kfac_flat.pruning.tracing import skeleton
from kfac_flat.pruning.undo import Undo
from kfac_flat.structure import Kept, unwrap


@runtime_checkable
class PenalisingOptimizer(Protocol):
    """An optimizer whose objective depends on neurons beyond what the weights' gradients tell."""

    def input_mask_gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """Gradient at masks on layers' inputs that does not go through the weights, ``[C_in]``, by the weight."""


class NeuronPruner:
    """Remove the neurons that matter least, physically, while training goes on.

    A neuron is an output channel of a Linear or convolution, the model's own outputs not counted. Channels that a
    residual addition or a shared reader ties together go together. Which matter least is told by Theta, the first-order
    effect of removing them on the objective that the optimizer descends: the loss and, with :class:`FlatKFAC`, its
    penalty [Ebrahimi & Klabjan, arXiv 2111.08577, eq. 5-6]. It is read from weights and gradients at each optimizer
    step, at no extra pass. All layers compete, per neuron removed.

    The Parameter objects stay the same, the optimizer's state of the kept entries stays as it was, and what cannot be
    followed through the model is left uncut: see :attr:`frozen`.

    Args:
        model: The model being trained; wrapped by ``torch.compile`` if you like.
        optimizer: Any torch optimizer over its parameters.
        example_inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        target: Share of the neurons to remove in the end, in (0, 1).
        start: Epochs of training before the first removal.
        every: Epochs from one removal to the next.
        events: Number of removals, of equal size; the last comes at the end of epoch ``start + (events - 1) * every``.
        min_neurons: Neurons that each layer keeps at least.
        round_to: Leave layers that are cut at a multiple of this width; None for any.
        ignore: Layers whose neurons stay: names (shell patterns allowed) or classes.
        keep_removed: Keep what the last removal took, so that :meth:`undo` can put it back. It takes as much memory as
            the removed entries of the parameters, their gradients and the optimizer's state did.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another kind.
        ValueError: if an option is out of range, the model cannot be traced or run, or the target cannot be reached.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=1, every=1, events=1)
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=3, bias=True)
        )
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        target: float,
        start: int = 5,
        every: int = 2,
        events: int = 5,
        min_neurons: int = 1,
        round_to: int | None = None,
        ignore: Iterable[str | type[nn.Module]] = (),
        keep_removed: bool = False,
    ) -> None:
        self._schedule = Schedule(start, every, events)
        _check_options(model, optimizer, target, min_neurons, round_to)
        self._model, self._optimizer = unwrap(model), optimizer
        _check_shared(self._model, optimizer)
        self._target, self._min_neurons, self._round_to = target, min_neurons, round_to or 1
        self._graph = NeuronGraph(
            self._model, example_inputs, _ignored(self._model, ignore), _trained_elsewhere(self._model, optimizer)
        )
        self._channels = self._graph.channels
        self._kept = {n: (torch.arange(len(c.inputs)), torch.arange(len(c.outputs))) for n, c in self._channels.items()}
        self._size = self._measure(self._model, self._channels)
        self._original_neurons = self._size.neurons
        self._epoch = self._event = 0
        self.history: list[PruneReport] = []
        self._keep_removed = keep_removed
        self._undo: tuple[Undo, dict[str, Any], int] | None = None
        self._groups: Groups
        self._saliency: Saliency
        vars(self).update(self._unscored(self._channels))
        self._check_reachable()
        self._attach()

    def _attach(self) -> None:
        """Listen to the optimizer's steps."""
        handle = self._optimizer.register_step_pre_hook(_recording_hook(self))
        weakref.finalize(self, handle.remove)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_undo": None}  # what could be undone is the original's

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()  # a copied optimizer has no hooks

    # ---------------------------------------------------------------- reading

    @property
    def sparsity(self) -> float:
        """Neurons removed so far / original neurons."""
        return 1 - self._size.neurons / self._original_neurons

    @property
    def finished(self) -> bool:
        """Whether the target has been reached, or all events have passed."""
        return self.sparsity >= self._target or self._event >= self._schedule.events

    @property
    def size(self) -> Size:
        """Neurons, parameters and multiply-accumulates of the model as it is."""
        return self._size

    @property
    def frozen(self) -> dict[str, str]:
        """Layers with neurons that cannot go, by name, and why."""
        return dict(self._graph.frozen)

    @property
    def widths(self) -> dict[str, int]:
        """Output channels of every Linear and convolution as it is now, by name."""
        return self._widths(self._channels)

    # ---------------------------------------------------------------- stepping

    def step(self) -> PruneReport:
        """End an epoch: remove neurons if the schedule says so, and report.

        Raises:
            CutError: if the cut cannot be made; model, optimizer and pruner are as they were before the call.
        """
        epoch = self._epoch + 1
        self._check_known()
        scores = self._scores()
        cut: list[Change] = []
        own: dict[str, Any] = {"_epoch": epoch}
        if self.finished:
            report = self._report(epoch, reason=_FINISHED)
        elif not self._schedule.is_due(epoch):
            report = self._report(epoch, reason=f"the schedule has no removal at the end of epoch {epoch}")
        elif scores is None:
            report = self._report(epoch, reason=_UNSCORED)
        else:
            report, gone = self._choose(epoch, scores)
            own["_event"] = self._event + 1
            if report:
                cut = self._cut(gone, report.after)
        make_all([*cut, setting(self, own), appending(self.history, report)])
        return report

    def plan(self) -> PruneReport:
        """Tell what the next removal would do if it came now; nothing changes."""
        self._check_known()
        scores = self._scores()
        if self.finished or scores is None:
            return self._report(self._epoch, reason=_FINISHED if self.finished else _UNSCORED)
        return self._choose(self._epoch, scores)[0]

    def undo(self) -> None:
        """Put back the neurons that the last removal took; for pruners made with ``keep_removed=True``.

        What went comes back as it was then: parameters, buffers, gradients, the optimizer's state. What stayed keeps
        its present values, and the Parameter objects stay the same. The pruner itself is as it was before the
        :meth:`step` that removed the neurons: its next ``step()`` ends that same epoch again.

        Raises:
            CutError: if there is nothing to undo, or it cannot be done; nothing has changed.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pruner = NeuronPruner(
            ...     model, optimizer, torch.randn(1, 4), target=0.5, start=1, events=1, keep_removed=True
            ... )
            >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
            >>> optimizer.step()
            >>> before = model[0].weight.clone().detach()
            >>> assert pruner.step()
            >>> pruner.undo()
            >>> torch.equal(model[0].weight, before)
            True
        """
        if not self._keep_removed:
            raise CutError("what went has not been kept: make the pruner with keep_removed=True")
        if self._undo is None:
            raise CutError("there is nothing to undo: only the last removal made by step() can be undone, once")
        self._check_known()
        undo, before, steps = self._undo
        make_all([*undo.changes(), setting(self, {**before, "_undo": None}), truncating(self.history, steps)])

    def _scores(self) -> list[float] | None:
        """Effect of removing each group, in the order of ``self._groups``; None while nothing is known of it."""
        return self._saliency.scores()

    def _choose(self, epoch: int, scores: list[float]) -> tuple[PruneReport, Tensor]:
        """Choose the groups that go with the next event, and prove on a skeleton that the model can do without them."""
        due = round(self._target * self._schedule.share(self._event + 1) * self._original_neurons)
        count = due - (self._original_neurons - self._size.neurons)
        if count <= 0:
            return self._report(epoch, reason="an earlier removal took this one's share along"), self._groups.ids[:0]
        gone = self._groups.cheapest(scores, count, min_neurons=self._min_neurons, round_to=self._round_to)
        if not len(gone):
            return self._report(epoch, reason=self._why_less(scores)), gone
        after = self._size_without(gone)
        reason = self._why_less(scores) if self._size.neurons - after.neurons < count else ""
        return self._report(epoch, gone, after, reason), gone

    def _size_without(self, gone: Tensor) -> Size:
        """Make a cut on a skeleton, prove that each layer then reads the neurons it should, and measure."""
        remaining = without(self._channels, gone)
        small = skeleton(self._model)
        Surgery(small, kept_without(self._channels, gone)).apply()
        self._graph.verify(small, remaining)
        return self._measure(small, remaining)

    def _cut(self, gone: Tensor, size: Size) -> list[Change]:
        """Prepare a cut of the model and all that follows it, this pruner included."""
        kept = kept_without(self._channels, gone)
        positions = dict(self._kept)
        for name, keep in kept.items():
            inputs, outputs = positions[name]
            positions[name] = inputs[keep.inputs], outputs[keep.outputs]
        channels = without(self._channels, gone)
        own = {"_kept": positions, "_channels": channels, "_size": size, **self._unscored(channels)}
        surgery = Surgery(self._model, kept, self._optimizer)
        if self._keep_removed:
            before = {name: getattr(self, name) for name in (*own, "_epoch", "_event")}
            own["_undo"] = Undo(surgery, kept, self._optimizer), before, len(self.history)
        return [*surgery.changes, setting(self, own)]

    def _unscored(self, channels: Mapping[str, Channels]) -> dict[str, Any]:
        """Groups and scores to begin with anew: effects measured before a cut say little of the model after it."""
        groups = self._groups_of(channels)
        consumers = {name: self._model.get_submodule(name) for name in self._graph.consumers}
        return {
            "_groups": groups,
            "_saliency": Saliency(consumers, {n: channels[n].inputs for n in consumers}, groups.ids),
        }

    def _knows_the_model(self) -> bool:
        """Tell whether the model's layers are as wide as this pruner left them."""
        return all(
            rules.channel_counts(self._model.get_submodule(name)) == (len(c.inputs), len(c.outputs))
            for name, c in self._channels.items()
        )

    def _check_known(self) -> None:
        if not self._knows_the_model():
            raise CutError(
                "the model's layers have been changed by something else, such as a second NeuronPruner: "
                "make a new pruner for the model as it is now"
            )

    def _groups_of(self, channels: Mapping[str, Channels]) -> Groups:
        return Groups.of({name: channels[name].outputs for name in self._graph.hidden})

    def _record(self, stepping: Optimizer) -> None:
        """Score a step that ``stepping`` is about to make, on the gradients it is made with."""
        if not self._knows_the_model():
            return  # step() will say so
        optimizer = self._optimizer
        direct = optimizer.input_mask_gradients() if isinstance(optimizer, PenalisingOptimizer) else {}
        # A fused optimizer under a GradScaler divides by the scale itself, inside its step.
        self._saliency.record(direct, getattr(stepping, "grad_scale", None))

    # ---------------------------------------------------------------- reporting

    def _measure(self, model: nn.Module, channels: Mapping[str, Channels]) -> Size:
        neurons = sum(len(channels[name].outputs) for name in self._graph.hidden)
        return Size(neurons, sum(p.numel() for p in model.parameters()), self._graph.macs(model))

    def _widths(self, channels: Mapping[str, Channels]) -> dict[str, int]:
        return {name: len(channels[name].outputs) for name in self._graph.producers}

    def _report(
        self, epoch: int, gone: Tensor | None = None, after: Size | None = None, reason: str = ""
    ) -> PruneReport:
        remaining = self._channels if gone is None else without(self._channels, gone)
        after = after or self._size
        removed = {}
        for name in self._graph.producers if gone is not None else ():
            lost = torch.isin(self._channels[name].outputs, gone)  # type: ignore[arg-type]
            if lost.any():
                removed[name] = self._kept[name][1][lost]
        return PruneReport(
            epoch=epoch,
            widths_before=self._widths(self._channels),
            widths_after=self._widths(remaining),
            before=self._size,
            after=after,
            sparsity=1 - after.neurons / self._original_neurons,
            removed=removed,
            reason=reason,
        )

    def _why_less(self, scores: list[float]) -> str:
        """Say what keeps the neurons that were due."""
        unscored = sum(score == math.inf for score in scores)
        reasons = [f"what is left is at its floor (min_neurons={self._min_neurons}, round_to={self._round_to})"]
        if unscored:
            reasons.append(f"{unscored} groups are read by layers whose weights had no gradient")
        if self.frozen:
            reasons.append("layers named in pruner.frozen cannot lose neurons")
        return "fewer neurons went than were due: " + "; ".join(reasons)

    def _check_reachable(self) -> None:
        """Refuse a target that no cut can reach, rather than stop short of it after hours."""
        groups, every = self._groups, self._original_neurons
        if not every:
            raise ValueError(
                "the model has no neurons to remove: no Linear or convolution but those that form its output"
            )
        most = groups.cheapest([0.0] * len(groups.ids), every, min_neurons=self._min_neurons, round_to=self._round_to)
        removable = every - sum(
            len(c.outputs) for n, c in without(self._channels, most).items() if n in self._graph.hidden
        )
        if removable < self._target * every:
            frozen = "".join(f"\n  {name}: {reason}" for name, reason in self.frozen.items())
            raise ValueError(
                f"target={self._target} cannot be reached: {removable} of the model's {every} neurons can be removed "
                f"with min_neurons={self._min_neurons}, round_to={self._round_to}. "
                f"Layers that cannot lose neurons:{frozen}"
            )

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, plain tensors, numbers and names (``torch.load(..., weights_only=True)``).

        ``["layers"][name]`` is ``{"in": ..., "out": ...}``: the kept channels of each module, ``int64`` positions into
        the ORIGINAL module. :func:`kfac_flat.shrink` needs no more than that.
        """
        return {
            "layers": {name: {"in": inputs, "out": outputs} for name, (inputs, outputs) in self._kept.items()},
            "epoch": self._epoch,
            "event": self._event,
            "saliency": self._saliency.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Cut the fresh dense model to the recorded shape and go on from there.

        Load the model's and the optimizer's own state dicts afterwards.

        Raises:
            ValueError: if the state belongs to another model, or keeps what this one has lost; nothing has changed.
        """
        missing = [key for key in ("layers", "epoch", "event", "saliency") if key not in state_dict]
        if missing:
            raise ValueError(f"this is no state of a NeuronPruner: it lacks {', '.join(missing)}")
        layers = {name: (entry["in"].cpu(), entry["out"].cpu()) for name, entry in state_dict["layers"].items()}
        if layers.keys() != self._kept.keys():
            different = sorted(layers.keys() ^ self._kept.keys())
            raise ValueError(f"the state belongs to another model: {', '.join(different)} stand in one of them only")
        lost = []
        for name, (_, outputs) in layers.items():
            own = self._kept[name][1]
            if not torch.isin(outputs, own).all():
                raise ValueError(
                    f"the state keeps channels of {name} that this model no longer has: load it into the dense model"
                )
            lost.append(self._channels[name].outputs[~torch.isin(own, outputs)])
        gone = torch.unique(torch.cat(lost))
        kept = kept_without(self._channels, gone)
        for name, (inputs, outputs) in self._kept.items():
            keep = kept.get(name, Kept(torch.arange(len(inputs)), torch.arange(len(outputs))))
            if not (
                torch.equal(inputs[keep.inputs], layers[name][0])
                and torch.equal(outputs[keep.outputs], layers[name][1])
            ):
                raise ValueError(f"the state keeps other channels of {name} than go together in this model")
        loaded = self._unscored(without(self._channels, gone))
        if len(state_dict["saliency"]["total"]) != len(loaded["_groups"].ids):
            raise ValueError("the state's saliency belongs to another number of groups than this model has")
        loaded["_saliency"].load_state_dict(state_dict["saliency"])
        loaded |= {"_epoch": state_dict["epoch"], "_event": state_dict["event"], "_undo": None}
        make_all([*self._cut(gone, self._size_without(gone)), setting(self, loaded)])


_FINISHED = "finished: the target has been reached or all events have passed"
_UNSCORED = "no optimizer step with finite gradients since the last removal, so nothing is known of the neurons"


def _recording_hook(pruner: NeuronPruner) -> Callable[..., Any]:
    """Make a step pre-hook that does not keep the pruner alive; a closure makes the gradients, so it comes first."""
    reference = weakref.ref(pruner)

    def record(optimizer: Optimizer) -> None:
        alive = reference()
        if alive is not None:
            alive._record(optimizer)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            record(optimizer)
            return None

        def recorded() -> Any:
            loss = closure()
            record(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": recorded}

    return hook


def _ignored(model: nn.Module, ignore: Iterable[str | type[nn.Module]]) -> dict[str, str]:
    """Names of all modules that are, or lie inside, what is to be ignored."""
    if isinstance(ignore, (str, type)):
        raise ValueError(f"ignore={ignore!r} must be a collection of names and classes, such as ({ignore!r},)")
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for choice in ignore:
        if not isinstance(choice, (str, type)):
            meant = "".join(f"; say {name!r}" for name, module in modules.items() if module is choice)
            raise ValueError(f"ignore= takes names and classes, not a {type(choice).__name__} itself{meant}")
        roots = [
            name
            for name, module in modules.items()
            if (fnmatch.fnmatchcase(name, choice) if isinstance(choice, str) else isinstance(module, choice))
        ]
        if not roots:
            raise ValueError(f"ignore={choice!r} matches no module of the model")
        inside = (name for name in modules if any(name == root or name.startswith(f"{root}.") for root in roots))
        found.update(dict.fromkeys(inside, "ignored on request"))
    return found


def _trained_elsewhere(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    """Names of modules with trainable parameters that this optimizer does not hold, whose state would stay behind."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {
        name: "has trainable parameters that are not the optimizer's"
        for name, module in model.named_modules()
        if any(p is not None and p.requires_grad and id(p) not in held for p in module._parameters.values())
    }


def _check_options(model: Any, optimizer: Any, target: float, min_neurons: int, round_to: int | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError("prune the model inside the wrapper, model.module, and wrap it anew after each removal")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer instance, not {type(optimizer).__name__}")
    if not isinstance(target, (int, float)) or not 0 < target < 1:
        raise ValueError(f"target={target!r} must lie in (0, 1): it is the share of neurons to remove")
    for name, value in (("min_neurons", min_neurons), ("round_to", 1 if round_to is None else round_to)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def _check_shared(model: nn.Module, optimizer: Optimizer) -> None:
    wrapper = getattr(optimizer, "_kfac_flat", None)
    if wrapper is not None and wrapper() is not None:
        raise ValueError("give NeuronPruner the FlatKFAC itself, not the optimizer that it wraps")
    of_model = {id(p) for p in model.parameters()}
    if not any(id(p) in of_model for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: build it from the parameters of this very model"
        )
