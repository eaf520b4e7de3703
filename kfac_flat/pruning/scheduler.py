"""NeuronPruner: stepped once an epoch like a learning-rate scheduler, it makes the model smaller."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat.changes import Change, appending, make_all, setting, truncating
from kfac_flat.distributed import Agreement
from kfac_flat.pruning.budget import ROUNDING, Options, Ranking, Schedule
from kfac_flat.pruning.checks import check_kinds, check_shared, checked_copies, ignored, trained_elsewhere
from kfac_flat.pruning.collection import no_collection
from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.graph import Channels, NeuronGraph, kept_without
from kfac_flat.pruning.groups import Groups
from kfac_flat.pruning.readings import Readings
from kfac_flat.pruning.remaining import NONE, Remaining, Removal
from kfac_flat.pruning.report import PruneReport, Size, scalars
from kfac_flat.pruning.saliency import Saliency
from kfac_flat.pruning.surgery import Surgery
from kfac_flat.pruning.undo import Undo
from kfac_flat.structure import Kept, unwrap


@runtime_checkable
class PenalisingOptimizer(Protocol):
    """An optimizer whose objective depends on neurons beyond what the gradients in place tell."""

    def input_mask_gradients(self) -> Mapping[nn.Parameter, Tensor]:
        """Gradient at masks on layers' inputs beyond weight times ``p.grad``, ``[C_in]``, by the layer's weight."""


class NeuronPruner:
    """Remove the neurons that matter least, physically, while training goes on.

    A neuron is an output channel of a Linear or convolution, the model's own outputs not counted. Channels that a
    residual addition or a shared reader ties together go together. Which matter least is told by Theta, the first-order
    effect of removing them on the objective that the optimizer descends: the loss and, with :class:`FlatKFAC`, its
    penalty [Ebrahimi & Klabjan, arXiv 2111.08577, eq. 5-6]. It is read from weights and gradients when the optimizer
    steps, at no extra pass. All layers compete, per neuron removed, unless ``ranking`` and ``per`` say otherwise; of
    equals, the first goes first.

    Each removal takes as few groups as bring the budget down to what is due by then. A group goes as a whole, so that a
    little more may go than was asked for, and later removals then take less.

    The Parameter objects stay the same, the optimizer's state of the kept entries stays as it was, and what cannot be
    followed through the model is left uncut: see :attr:`frozen`.

    In a run of several processes (``torch.distributed`` is initialised) all processes of the default group train the
    same model and call :meth:`step` at the same time. They go by the scores of rank 0, which the others' must equal,
    and cut together or not at all; see :func:`kfac_flat.rewrap` for DistributedDataParallel. A process that dies makes
    the cut fail in those that wait for it, after the group's timeout at the latest; nothing is sent while no removal is
    due, nor by :meth:`plan` and :meth:`load_state_dict`.

    Args:
        model: The model being trained; wrapped by ``torch.compile`` if you like.
        optimizer: Any torch optimizer over its parameters; several by :class:`ChainedOptimizer`.
        example_inputs: What the model is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        target: Share of the budget to remove in the end, in (0, 1).
        budget: What ``target`` is a share of: the model's "neurons", its "parameters", its "macs" (multiply-accumulates
            of one example), or its "latency": seconds of a call in eval mode on ``example_inputs``, measured on the
            model's device for every choice that is weighed, some 0.1 seconds each.
        start: Epochs of training before the first removal.
        every: Epochs from one removal to the next.
        events: Number of removals; the last comes at the end of epoch ``start + (events - 1) * every``.
        pace: How the target is divided among the events: "cubic", more at first, while there are many neurons to choose
            from [Zhu & Gupta, arXiv 1710.01878], or "linear", in equal steps.
        neurons_per_event: Remove this many neurons each time, as often as it takes; ``events`` and ``pace`` are not
            used then. Goes with budget "neurons" only.
        min_neurons: Neurons that each layer keeps at least.
        max_share: Share of its original neurons that a layer may lose at most in the whole run, in (0, 1]. By default
            each keeps 0.7 of what it would if all lost the target's share, rounded up, so that none becomes a
            bottleneck; rounded down, or none of it, where the target is out of reach otherwise.
        max_step: Share of its present neurons that a layer may lose at most in one event, in (0, 1]. A layer of fewer
            than ``1 / max_step`` neurons loses none, and where too little can go in the events that there are, the
            target is missed: see :attr:`PruneReport.reason`.
        round_to: Leave layers that are cut at a multiple of this width; None for any.
        ranking: "global": all layers compete; "layer": each loses the same share of its groups, to rounding, and scores
            decide within layers only.
        normalize: What a group's score is divided by before layers compete, so that it matters less how large the
            scores of a layer are as a whole: None, or the "mean", "max" or "l2" norm of the scores in the same layers.
        per: What scores are counted per: the "neuron", "parameter" or "mac" that a removal saves, or the "group". With
            "mac", groups whose removal saves none, such as those of a head that is there in training only, stay.
        ignore: Layers whose neurons stay: names (shell patterns allowed) or classes.
        readings: How many of an epoch's steps Theta is read at, spread evenly; up to twice as many where the numbers
            do not go into each other, and all where there are fewer. A reading costs about what summing up the weights
            and gradients does. None for every step.
        copies: Models of the same structure that are cut along, such as an ``AveragedModel`` or a teacher.
        keep_removed: Keep what the last removal took, so that :meth:`undo` can put it back. It takes as much memory as
            the removed entries of the parameters, their gradients and the optimizer's state did.

    Attributes:
        history: The reports of all :meth:`step` calls of this object, oldest first.

    Raises:
        TypeError: if ``model``, one of ``copies`` or ``optimizer`` is of another kind.
        ValueError: if an option is out of range, one of ``copies`` is built differently, the model cannot be traced or
            run, or the target cannot be reached.

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

    # Subclasses that go by other criteria replace what is gathered at the optimizer's steps, or override _scores().
    _criterion: type[Saliency] = Saliency

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        target: float,
        start: int = 5,
        every: int = 1,
        events: int = 10,
        budget: str = "neurons",
        pace: str = "cubic",
        neurons_per_event: int | None = None,
        min_neurons: int = 1,
        max_share: float | None = None,
        max_step: float = 1.0,
        round_to: int | None = None,
        ranking: str = "global",
        normalize: str | None = None,
        per: str = "neuron",
        ignore: Iterable[str | type[nn.Module]] = (),
        readings: int | None = 16,
        copies: Iterable[nn.Module] = (),
        keep_removed: bool = False,
    ) -> None:
        schedule = Schedule(start, every, events, pace)
        some = Readings(readings)
        self._readings = Readings(None) if self._criterion.every_step else some
        self._options = Options(
            *(target, budget, neurons_per_event, min_neurons, max_share, max_step),
            *(1 if round_to is None else round_to, Ranking(ranking, normalize, per)),
        )
        check_kinds(model, optimizer)
        self._model, self._optimizer = unwrap(model), optimizer
        self._copies = checked_copies(self._model, copies)
        check_shared(self._model, optimizer)
        self._graph = NeuronGraph(
            self._model, example_inputs, ignored(self._model, ignore), trained_elsewhere(self._model, optimizer)
        )
        self._left = self._dense = Remaining.everything(self._model, self._graph, self._options)
        self._schedule = replace(schedule, events=self._options.events(self._left.size.neurons, events))
        self._epoch = self._event = 0
        self.history: list[PruneReport] = []
        self._keep_removed = keep_removed
        self._undo: tuple[Undo, dict[str, Any], int] | None = None
        self._saliency = self._unscored(self._left)
        self._make_reachable()
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
    def epoch(self) -> int:
        """How many epochs have ended, the number of :meth:`step` calls, those before a checkpoint included."""
        return self._epoch

    @property
    def sparsity(self) -> float:
        """Neurons removed so far / original neurons."""
        return 1 - self._left.size.neurons / self._dense.size.neurons

    @property
    def progress(self) -> float:
        """Share of the budget removed so far, ``target`` in the end; of a latency, as last measured."""
        return 1 - self._options.amount(self._left.size) / self._options.amount(self._dense.size)

    @property
    def finished(self) -> bool:
        """Whether the target has been reached, or all events have passed."""
        return self._options.reached(self.progress) or self._event >= self._schedule.events

    @property
    def size(self) -> Size:
        """Neurons, parameters and multiply-accumulates of the model as it is."""
        return self._left.size

    @property
    def frozen(self) -> dict[str, str]:
        """Layers with neurons that cannot go, by name, and why."""
        return dict(self._graph.frozen)

    @property
    def widths(self) -> dict[str, int]:
        """Output channels of every Linear and convolution as it is now, by name."""
        return self._left.widths()

    @property
    def survivors(self) -> dict[str, Tensor]:
        """Output channels left of every Linear and convolution, by name, as ``int64`` positions in the ORIGINAL layer.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1, bias=False))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            >>> pruner = NeuronPruner(model, optimizer, torch.ones(1, 2), target=0.5, start=1, events=1)
            >>> model[1].weight.grad = torch.tensor([[3.0, 0.0, 2.0, 0.0]]) / model[1].weight.detach()
            >>> optimizer.step()
            >>> report = pruner.step()
            >>> pruner.survivors["0"], report.removed["0"]
            (tensor([0, 2]), tensor([1, 3]))
        """
        return {name: self._left.kept[name][1].clone() for name in self._graph.producers}

    def scalars(self) -> dict[str, float]:
        """Return what a logger draws of the model as it is now, under the names of :meth:`PruneReport.scalars`."""
        return scalars(self.sparsity, self.size, self.widths)

    # ---------------------------------------------------------------- stepping

    @torch.inference_mode(False)  # what is made there could never be trained
    @no_collection()
    def step(self) -> PruneReport:
        """End an epoch: remove neurons if the schedule says so, and report.

        Raises:
            CutError: if the cut cannot be made; model, optimizer and pruner are as they were before the call.
        """
        epoch = self._epoch + 1
        with Agreement(needed=not self.finished and self._schedule.is_due(epoch)) as agreement:
            report, changes = self._end(epoch, agreement)
            make_all([*changes, appending(self.history, report)])
        return report

    def _end(self, epoch: int, agreement: Agreement) -> tuple[PruneReport, list[Change]]:
        """Prepare what is to happen at the end of this epoch."""
        self._check_known()
        own: dict[str, Any] = {"_epoch": epoch, "_readings": self._readings.ended()}
        changes: list[Change] = []
        if self.finished:
            report = self._report(epoch, reason=self._options.why_finished(self.progress))
        elif not self._schedule.is_due(epoch):
            report = self._report(epoch, reason=f"the schedule has no removal at the end of epoch {epoch}")
        elif (scores := agreement.on_scores(self._scores())) is None:
            report = self._report(epoch, reason=_UNSCORED)
        else:
            report, removal = self._choose(epoch, scores)
            own["_event"] = self._event + 1
            if report:
                changes = self._cut(removal)
            changes.append(Change(lambda: agreement.on_cut(removal.gone), lambda: None))
        return report, [*changes, setting(self, own)]

    def plan(self) -> PruneReport:
        """Tell what the next removal would do if it came now; nothing changes."""
        self._check_known()
        scores = self._scores()
        if self.finished or scores is None:
            return self._report(
                self._epoch, reason=self._options.why_finished(self.progress) if self.finished else _UNSCORED
            )
        return self._choose(self._epoch, scores)[0]

    @torch.inference_mode(False)  # what is made there could never be trained
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

    @property
    def _groups(self) -> Groups:
        return self._left.groups

    @property
    def _channels(self) -> Mapping[str, Channels]:
        return self._left.channels

    def _scores(self) -> list[float] | None:
        """Effect of removing each group, in the order of ``self._groups``; None while nothing is known of it."""
        return self._saliency.scores()

    def _choose(self, epoch: int, scores: list[float]) -> tuple[PruneReport, Removal]:
        """Choose the groups that go with the next event, and prove on a skeleton that the model can do without them."""
        event, nothing = self._event + 1, Removal(NONE, self._left)
        goal = self._options.goal(self._options.amount(self._dense.size), event, self._schedule.share(event))
        if self._options.amount(self._left.size) <= goal:
            return self._report(epoch, reason="an earlier removal took this one's share along"), nothing
        gone = self._left.fewest(scores, goal, self._options)
        if not len(gone):
            return self._report(epoch, reason=self._why_less(scores)), nothing
        removal = self._left.removal(gone)
        reason = self._why_less(scores) if self._options.amount(removal.left.size) > goal else ""
        return self._between(self._left, removal.left, epoch, reason), removal

    def _cut(self, removal: Removal) -> list[Change]:
        """Prepare a cut of the model and all that follows it, this pruner included."""
        kept = kept_without(self._left.channels, removal.gone)
        own: dict[str, Any] = {"_left": removal.left, "_saliency": self._unscored(removal.left)}
        surgery = Surgery(self._model, kept, self._optimizer, self._copies)
        if self._keep_removed:
            before = {name: getattr(self, name) for name in (*own, "_epoch", "_event", "_readings")}
            own["_undo"] = Undo(surgery, kept, self._optimizer), before, len(self.history)
        return [*surgery.changes, setting(self, own)]

    def _unscored(self, left: Remaining) -> Saliency:
        """Scores to begin with anew: effects measured before a cut say little of the model after it."""
        consumers = {name: self._model.get_submodule(name) for name in self._graph.consumers}
        return self._criterion(consumers, {name: left.channels[name].inputs for name in consumers}, left.groups.ids)

    def _check_known(self) -> None:
        self._graph.check_code(self._model)
        if not self._left.fits():
            raise CutError(
                "the model's layers have been changed by something else, such as a second NeuronPruner: "
                "make a new pruner for the model as it is now"
            )

    def _record(self, stepping: Optimizer) -> None:
        """Score a step that ``stepping`` is about to make, on the gradients it is made with."""
        if self.finished or not self._readings.next() or not self._saliency.fits():
            return  # of layers that do not fit, step(), which looks at all, will tell
        optimizer = self._optimizer
        direct = optimizer.input_mask_gradients() if isinstance(optimizer, PenalisingOptimizer) else {}
        # A fused optimizer under a GradScaler divides by the scale itself, inside its step.
        self._saliency.record(direct, getattr(stepping, "grad_scale", None))

    # ---------------------------------------------------------------- reporting

    def _report(self, epoch: int, reason: str) -> PruneReport:
        """Report that nothing went."""
        return self._between(self._left, self._left, epoch, reason)

    def _between(self, before: Remaining, after: Remaining, epoch: int, reason: str = "") -> PruneReport:
        """Report on all that went from one state to the other."""
        removed = {}
        for name in self._graph.producers:
            lost = ~torch.isin(before.kept[name][1], after.kept[name][1])
            if lost.any():
                removed[name] = before.kept[name][1][lost]
        return PruneReport(
            epoch=epoch,
            widths_before=before.widths(),
            widths_after=after.widths(),
            before=before.size,
            after=after.size,
            sparsity=1 - after.size.neurons / self._dense.size.neurons,
            removed=removed,
            reason=reason,
            frozen=self.frozen,
        )

    def html(
        self,
        path: str | os.PathLike[str],
        *,
        series: Mapping[str, Sequence[float]] | None = None,
        title: str = "Pruning run",
    ) -> Path:
        """Write the whole run so far as a page to look at in a browser: one file that needs nothing else, no network.

        It shows the model's sizes now and at the beginning, how they and ``series`` went over the epochs, the width of
        every layer, which of the original channels are left, and what is frozen and why.

        Args:
            path: Where to save the page.
            series: What else to draw over the epochs, such as accuracy and rho: for each name one value per report in
                :attr:`history`, float("nan") where there is none.
            title: Stands above the page.

        Returns:
            The path.

        Raises:
            ValueError: if one of ``series`` has more or fewer values than there are reports; nothing is written.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pruner = NeuronPruner(model, optimizer, torch.randn(1, 4), target=0.5, start=2)
            >>> accuracy = []
            >>> for epoch in range(3):
            ...     nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
            ...     optimizer.step()
            ...     accuracy.append(90.0 + epoch)
            ...     report = pruner.step()
            >>> with TemporaryDirectory() as folder:
            ...     pruner.html(f"{folder}/run.html", series={"accuracy (%)": accuracy}).name
            'run.html'
        """
        from kfac_flat.pruning import page  # most runs never write one

        run = self._between(self._dense, self._left, self._epoch)
        return page.write_run(run, self.history, series or {}, path, title)

    def _why_less(self, scores: list[float]) -> str:
        """Say what keeps the neurons that were due."""
        unscored = sum(score == math.inf for score in scores)
        reasons = [f"what is left is at its floor ({self._options})"] if unscored < len(scores) else []
        if unscored:
            reasons.append(f"{unscored} groups are read by layers whose weights had no gradient")
        if self.frozen:
            reasons.append("layers named in pruner.frozen cannot lose neurons")
        return "fewer neurons went than were due: " + "; ".join(reasons)

    def _make_reachable(self) -> None:
        """Lower the floors that nobody asked for until a cut reaches the target; refuse it if none does."""
        every = self._options.amount(self._left.size)
        frozen = "".join(f"\n  {name}: {reason}" for name, reason in self.frozen.items())
        if not self._left.size.neurons:
            raise ValueError(
                "the model has no neurons to remove: no Linear or convolution but those that form its output. "
                f"Layers that cannot lose neurons:{frozen}"
            )
        goal = every * (1 - self._options.target + ROUNDING)
        for options in self._options.relaxed():
            self._options, least = options, self._least(options)
            if least <= goal:
                return
        found = (
            f"a call takes {1e6 * every:,.3g} microseconds, and {1e6 * least:,.3g} where all goes that can"
            if self._options.times
            else f"{every - least:,.9g} of the model's {every:,.9g} {self._options.budget} can be removed"
        )
        raise ValueError(  # rather than stop short of it after hours
            f"target={self._options.target} cannot be reached: {found} with {self._options}. "
            f"Layers that cannot lose neurons:{frozen}"
        )

    def _least(self, options: Options) -> float:
        """Return what is left of the budget where all goes that may."""
        gone = self._left.fewest([0.0] * len(self._left.groups.ids), 0.0, replace(options, max_step=1.0))
        return self._left.amount_without(gone)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, plain tensors, numbers and names (``torch.load(..., weights_only=True)``).

        ``["layers"][name]`` is ``{"in": ..., "out": ...}``: the kept channels of each module, ``int64`` positions into
        the ORIGINAL module. :func:`kfac_flat.shrink` needs no more than that.
        """
        return {
            "layers": {name: {"in": inputs, "out": outputs} for name, (inputs, outputs) in self._left.kept.items()},
            "epoch": self._epoch,
            "event": self._event,
            "readings": [self._readings.before, self._readings.seen],
            "budget": self._options.budget,
            "original": self._options.amount(self._dense.size),
            "saliency": self._saliency.state_dict(),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Cut the fresh dense model to the recorded shape and go on from there.

        Load the model's and the optimizer's own state dicts afterwards.

        Raises:
            ValueError: if the state belongs to another model, or keeps what this one has lost; nothing has changed.
        """
        missing = [
            key
            for key in ("layers", "epoch", "event", "readings", "budget", "original", "saliency")
            if key not in state_dict
        ]
        if missing:
            raise ValueError(f"this is no state of a NeuronPruner: it lacks {', '.join(missing)}")
        if state_dict["budget"] != self._options.budget:
            raise ValueError(
                f"the state is of a run with budget={state_dict['budget']!r}, and this one has {self._options.budget!r}"
            )
        layers = {name: (entry["in"].cpu(), entry["out"].cpu()) for name, entry in state_dict["layers"].items()}
        if layers.keys() != self._left.kept.keys():
            different = sorted(layers.keys() ^ self._left.kept.keys())
            raise ValueError(f"the state belongs to another model: {', '.join(different)} stand in one of them only")
        lost = []
        for name, (_, outputs) in layers.items():
            own = self._left.kept[name][1]
            if not torch.isin(outputs, own).all():
                raise ValueError(
                    f"the state keeps channels of {name} that this model no longer has: load it into the dense model"
                )
            lost.append(self._left.channels[name].outputs[~torch.isin(own, outputs)])
        gone = torch.unique(torch.cat(lost))
        kept = kept_without(self._left.channels, gone)
        for name, (inputs, outputs) in self._left.kept.items():
            keep = kept.get(name, Kept(torch.arange(len(inputs)), torch.arange(len(outputs))))
            if not (
                torch.equal(inputs[keep.inputs], layers[name][0])
                and torch.equal(outputs[keep.outputs], layers[name][1])
            ):
                raise ValueError(f"the state keeps other channels of {name} than go together in this model")
        removal = self._left.removal(gone)
        saliency = self._unscored(removal.left)
        saliency.load_state_dict(state_dict["saliency"])
        loaded = {"_saliency": saliency, "_epoch": state_dict["epoch"], "_event": state_dict["event"], "_undo": None}
        loaded["_readings"] = Readings(self._readings.per_epoch, *state_dict["readings"])
        if self._options.times:  # what the rest of the run is measured by
            size = replace(self._dense.size, latency=state_dict["original"])
            loaded["_dense"] = replace(self._dense, size=size)
        make_all([*self._cut(removal), setting(self, loaded)])


_UNSCORED = "no optimizer step with finite gradients since the last removal, so nothing is known of the neurons"


def _recording_hook(pruner: NeuronPruner) -> Callable[..., Any]:
    """Make a step pre-hook that does not keep the pruner alive; a closure makes the gradients, so it comes first."""
    reference = weakref.ref(pruner)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
