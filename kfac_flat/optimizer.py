"""FlatKFAC: any torch optimizer, with the gradient of mu * max(0, rho - K) added to what it steps on."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from kfac_flat.attention import kept_by_projections
from kfac_flat.averaging import mean_over_processes, processes, rank, world_size
from kfac_flat.changes import Change, setting
from kfac_flat.curvature.likelihood import Likelihood, prediction, resolve
from kfac_flat.curvature.tracker import HostCopy, Join, RadiusGradient, RadiusTracker, Select, Tracker
from kfac_flat.curvature.twin import layer_names, unread_modules, weight_of
from kfac_flat.mask_terms import MaskTerms
from kfac_flat.nested import largest_difference
from kfac_flat.pruning.layers import is_producer
from kfac_flat.pruning.layers import weight_of as reading_weight
from kfac_flat.pruning.saliency import input_mask_gradient
from kfac_flat.recorder import CallRecorder, RecordedCall
from kfac_flat.structure import Kept
from kfac_flat.warn import warn_user
from kfac_flat.wrapper import OptimizerWrapper

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class _Options:
    """The keyword arguments of :class:`FlatKFAC`, found to be in range."""

    mu: Schedule
    rho_max: Schedule
    penalty: str
    every: int
    survey_every: int
    batch_fraction: float
    fisher: str
    criterion: nn.Module | None
    likelihood: str | Likelihood
    reduction: str
    layers: Iterable[str | type[nn.Module]] | None
    eigenpairs: str
    clip: float | None
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(map(repr, allowed))}")
        if self.fisher == "empirical" and not isinstance(self.criterion, nn.Module):
            raise ValueError('fisher="empirical" needs criterion=, the loss module of the training loop')
        for name in ("mu", "rho_max"):
            value = getattr(self, name)
            if not callable(value) and not _is_number(value, 0, math.inf):
                raise ValueError(f"{name}={value!r} must be a number >= 0, or a function of the step count")
        for name, unit in (("every", "steps"), ("survey_every", "refreshes")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of {unit}, at least 1")
        if not _is_number(self.batch_fraction, 0, 1 + 1e-12) or not self.batch_fraction:
            raise ValueError(f"batch_fraction={self.batch_fraction!r} must lie in (0, 1]")
        if not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r} must be a whole number")
        if self.clip is not None and not (_is_number(self.clip, 0, math.inf) and self.clip):
            raise ValueError(f"clip={self.clip!r} must be positive, or None for no bound")


def _is_number(value: Any, low: float, high: float) -> bool:
    """Tell whether the value is a number in [low, high)."""
    return isinstance(value, (int, float)) and low <= value < high


_CHOICES = {
    "penalty": ("linear", "log"),
    "fisher": ("sampled", "empirical"),
    "reduction": ("max", "sum"),
    "eigenpairs": ("streaming", "exact"),
}


# What a model raises that does not run on the examples it is given.
_CANNOT_RUN = (RuntimeError, ValueError, TypeError, LookupError)

# Precision, compiled code and other kernels change an output by less, relative to its norm.
_DIFFERENT = 0.05


class FlatKFAC(OptimizerWrapper):
    """Wrap a torch optimizer so that it also minimises the spectral radius of the K-FAC curvature.

    The objective is the loss plus ``mu * max(0, log(rho / K))``, or ``mu * max(0, rho - K)`` [Ebrahimi & Klabjan, arXiv
    2111.08577, eq. 4], with ``rho = max_l lambda_max(A_l) lambda_max(G_l)`` over the Linear and Conv2d layers. The
    training loop stays as it is.
    ``step()`` does the following:

    1. Every ``every`` steps, a copy of the model that shares its parameters repeats the last training forward pass, on
       the first ``batch_fraction`` of the batch.
    2. A BackPACK extension reads the input and output gradient of layers in one backward pass, and one step of power
       iteration brings the top eigenvectors of their Kronecker factors up to date: of every layer at each
       ``survey_every``-th of these refreshes, otherwise of the layer that attains the maximum.
    3. rho of the layer that attained the maximum at the refresh before (so that nothing waits for the device) is
       differentiated with respect to all parameters.
    4. That gradient, times the penalty's slope where rho exceeds ``rho_max``, and times the number of steps until the
       next refresh, is added to ``p.grad``, as far as ``clip`` allows. The steps in between are the wrapped optimizer's
       own (lazy regularization [Karras et al., arXiv 1912.04958, section 3.1]).
    5. The wrapped optimizer steps.

    With ``mu=0`` steps 1 to 4 do not happen and the trajectory is the wrapped optimizer's, bit for bit.

    Args:
        optimizer: An optimizer instance over (some of) the model's parameters; several by :class:`ChainedOptimizer`.
            ``param_groups``, ``state`` and ``defaults`` stay its own: schedulers, scalers and checkpoints see one
            truth. Step the wrapper, not this.
        model: The model being trained; wrappers may be on. With several processes, the default group's (or that of a
            DistributedDataParallel given) are taken to train it together, each on its part of one batch.
        mu: Weight of the penalty, or a function of the step count. A parameter group with an entry ``"mu"`` or
            ``"rho_max"`` of its own descends the objective with that one instead.
        rho_max: K, the spectral radius below which there is no penalty, or a function of the step count.
        penalty: ``"log"``, mu * max(0, log rho - log K), whose gradient mu * grad rho / rho does not depend on the
            scale of rho, so that one mu serves many networks, or ``"linear"``, mu * max(0, rho - K) as in the paper.
        every: Steps from one computation of the penalty's gradient to the next, a refresh.
        survey_every: Refreshes from one look at all layers, to see which attains the maximum, to the next. There is one
            as well after a cut, and when the penalty comes back after refreshes without.
        batch_fraction: Share of the batch, in (0, 1], that it is computed on; at least two examples, counted along the
            first axis of the model's arguments; where its output shows that this is another one, all of them, with a
            warning. Gradients that accumulate are those of one batch, of all examples since they were cleared; where
            these do not fit together, as images of different sizes, it is the last micro-batch. Dropout falls as on a
            single batch.
        fisher: ``"sampled"``: the true Fisher, whose labels are the model's own prediction, by one random combination
            of their gradients per example (see ``kfac_flat.likelihood``); ``"empirical"``: the batch's labels, as
            remembered by a hook on ``criterion``. With ``every=1`` and ``mu=0.03`` either made minima of a dense
            network about as flat as SAM's.
        criterion: The loss module called in the training loop as ``criterion(model(x), y)``; for
            ``fisher="empirical"`` only.
        likelihood: What the model's output means, or the ``logits`` in it where it is a mapping, for the true Fisher:
            ``"categorical"`` logits ``[N, classes, ...]``, ``"gaussian"`` means, ``"bernoulli"`` logits, or a callable
            ``(output, generator)`` that returns losses ``[N]`` whose gradients have the Fisher for covariance, as
            negative log-likelihoods at drawn labels do.
        reduction: ``"max"`` over layers as in the paper, or ``"sum"``.
        layers: Restrict to these layers: names (shell patterns allowed) or classes.
        eigenpairs: ``"streaming"``, or ``"exact"`` to form and decompose the factors at each refresh.
        clip: Bound on the norm of what is added, relative to that of the loss's gradient at this step; None for no
            bound. With ``penalty="linear", every=1, survey_every=1, batch_fraction=1, clip=None`` it is the paper's
            plain penalty.
        seed: Of the true Fisher's random signs and the starting vectors. torch's global generators are never touched.

    Raises:
        TypeError: if ``optimizer`` is no optimizer instance or ``model`` no module.
        ValueError: if an option is out of range, the optimizer's parameters are not the model's, or the model has no
            Linear or Conv2d layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> nn.functional.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
        >>> optimizer.rho > 0, sorted(optimizer.radii())
        (True, ['0', '2'])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        mu: Schedule = 0.003,
        rho_max: Schedule = 0.0,
        penalty: str = "log",
        every: int = 8,
        survey_every: int = 4,
        batch_fraction: float = 0.25,
        fisher: str = "sampled",
        criterion: nn.Module | None = None,
        likelihood: str | Likelihood = "categorical",
        reduction: str = "max",
        layers: Iterable[str | type[nn.Module]] | None = None,
        eigenpairs: str = "streaming",
        clip: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        self._options = _Options(
            mu=mu,
            rho_max=rho_max,
            penalty=penalty,
            every=every,
            survey_every=survey_every,
            batch_fraction=batch_fraction,
            fisher=fisher,
            criterion=criterion,
            likelihood=likelihood,
            reduction=reduction,
            layers=layers if layers is None or isinstance(layers, (str, type)) else tuple(layers),
            eigenpairs=eigenpairs,
            clip=clip,
            seed=seed,
        )
        super().__init__(optimizer, model)
        penalised = any(group.get("mu", mu) != 0 for group in self.param_groups)
        if isinstance(optimizer, torch.optim.LBFGS) and every > 1 and penalised:
            raise ValueError(
                f"LBFGS compares the gradients of one step's calls of its closure, but with every={every} only some "
                "of these would have the penalty: give FlatKFAC every=1"
            )
        self._likelihood = resolve(likelihood)
        self._tracker = self._make_tracker()
        self._steps = 0
        self._paused = True  # whether the next step with a penalty computes it, whenever that is
        self._mask_terms = MaskTerms()
        self._held = 0  # how many times p.grad holds the penalty's gradient at this step
        self._whole_batches = False
        self._skipped: Tensor | None = None
        self._skipped_host = HostCopy()
        self._warned = False
        self._calls, self._criterion_calls = self._attach_recorders()
        self._calls.keeps_outputs = True  # until the first refresh has compared them with the twin's

    def _make_tracker(self) -> Tracker:
        """Make what rho is followed by."""
        options = self._options
        return RadiusTracker(
            self._inner,
            layer_names(self._inner, options.layers),
            reduction=options.reduction,
            exact=options.eigenpairs == "exact",
            seed=options.seed,
            skipped=unread_modules(self._inner) if options.layers is None else None,
            average=partial(mean_over_processes, group=processes(self.model)),
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        for calls in self._recorders():
            calls.forget_finished()
        super().zero_grad(set_to_none)

    # ---------------------------------------------------------------- reading

    @property
    def rho(self) -> float:
        """rho, from each layer's radius as last computed; NaN before. Reading it waits for the device."""
        rho = self._tracker.rho()
        return math.nan if rho is None else float(rho)

    def radii(self) -> dict[str, float]:
        """Spectral radius of each layer's Kronecker block, by module name, as last computed."""
        return {name: float(radius) for name, radius in self._tracker.radii.items()}

    @property
    def skipped(self) -> int:
        """Number of steps whose penalty was left out because loss, gradients or factors were not finite."""
        return 0 if self._skipped is None else int(self._skipped)

    @property
    def skipped_layers(self) -> dict[str, str]:
        """Layers whose curvature cannot be read, by name, and why."""
        return dict(self._tracker.skipped)

    def input_mask_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Gradient of the penalty at masks on layers' inputs, beyond what ``p.grad`` holds of it at this step.

        Together with weight times ``p.grad``, summed over what reads each input, it is that of loss plus penalty, at
        every step, whether it computes the penalty's gradient or not (see :class:`kfac_flat.NeuronPruner`).

        Returns:
            By weight of the layers that the penalty depends on, ``[C_in]``.
        """
        return self._mask_terms.by_weight(self._inner, 1, 1 - self._held)

    # ---------------------------------------------------------------- stepping

    def _change_gradients(self) -> None:
        """Add the penalty's gradient, at the steps that compute it."""
        if not self._has_penalty():  # what has been added before stands for the steps until the next refresh
            self._forget_penalty(paused=self._paused or self._is_regular())
        elif self._refreshes_next() and self._calls.last() is None and self._moves_nothing():
            self._forget_penalty()
            return  # no step of the training: the first one that is computes the penalty
        elif self._refreshes_next():
            self._refresh()
        else:
            self._held = 0
        self._steps += 1

    def _forget_penalty(self, *, paused: bool = True) -> None:
        """Know no penalty; the next step with one computes it or, unless ``paused``, the next that would anyway."""
        self._mask_terms, self._held, self._paused = MaskTerms(), 0, paused

    def _refresh(self) -> None:
        """Compute the penalty's gradient on the last training batch."""
        call = self._calls.last()
        if call is None:
            raise RuntimeError(
                "FlatKFAC.step() has seen no forward pass of the model it was given since its last refresh: call that "
                "model (not a copy or a part of it) with gradients enabled before step(); if it is compiled, "
                "give FlatKFAC what torch.compile returned"
            )
        left_alone = {p for group in self.param_groups if not self._setting(group, "mu") for p in group["params"]}
        parameters = [p for p in self._parameters_with_gradient() if p not in left_alone]
        if not parameters:  # the wrapped optimizer has nothing to do either
            self._forget_penalty()
            self._forget_calls()
            return
        try:
            gradient = self._rho_gradient(call, parameters)
            self._compare_outputs()
        except torch.OutOfMemoryError as error:
            if world_size(processes(self.model)) > 1:
                raise  # the others wait for what this process cannot send
            self._forget_penalty(paused=False)
            self._forget_calls()
            _warn_of_memory(error, call.batch_size, self._options.batch_fraction)
            return
        self._forget_calls()
        self._descend(gradient)
        self._paused = False

    def _moves_nothing(self) -> bool:
        """Tell whether gradients and learning rates are all zero, so that the step changes no weight.

        Torch's distributed checkpoints take such a step to make the state of an optimizer that has none.
        """
        gradients = [p.grad for p in self._all_parameters() if p.grad is not None]
        resting = bool(gradients) and not any(float(group.get("lr", 1)) for group in self.param_groups)
        return resting and not any(g.any() for g in gradients)

    def _descend(self, gradient: RadiusGradient) -> None:
        """Add the penalty's gradient for the steps until the next refresh; nothing where any of it is not finite."""
        penalty = gradient.parameters
        if not gradient.scaled:  # taken out one by one: there are never two copies of all
            weights = self._weights(gradient.rho)
            penalty = {p: weights[p] * penalty.pop(p) for p in list(penalty)}
        steps = self._options.every - self._steps % self._options.every
        factor = self._factor(penalty, steps).to(gradient.rho.device)
        finite = factor.isfinite()
        if finite.device.type != "cpu" or not finite:  # what is on the host can be asked without waiting
            factor = torch.where(finite, factor, 0.0)
            penalty = {p: torch.where(finite, penalty.pop(p), 0.0) for p in list(penalty)}
        self._mask_terms, self._held = self._at_masks(gradient, penalty, factor / steps), steps
        self._add(penalty, factor)
        self._count_skipped(finite)

    def _at_masks(self, gradient: RadiusGradient, penalty: Mapping[nn.Parameter, Tensor], factor: Tensor) -> MaskTerms:
        """Return the gradient of so many times the penalty at masks on layers' inputs."""
        weights, others = self._weights(gradient.rho), self._weight({}, gradient.rho)
        direct = {}
        for name, mask in gradient.input_masks.items():
            holder = weight_of(self._inner, name)
            weight = others if holder is None else weights.get(holder, others)
            direct[name] = torch.where(factor > 0, factor * weight * mask, 0.0)
        # One layer for each weight; the gradient at the weight is that of all.
        readers = {reading_weight(m): (name, m) for name, m in self._inner.named_modules() if is_producer(m)}
        through_weights = {
            name: factor * input_mask_gradient(layer, penalty[weight])
            for weight, (name, layer) in readers.items()
            if weight in penalty
        }
        return MaskTerms(direct, through_weights)

    def _factor(self, penalty: Mapping[nn.Parameter, Tensor], steps: int) -> Tensor:
        """Return what the penalty's gradient is multiplied by to stand for so many steps, within the bound.

        It stays on the device, and is not finite where either gradient is not.
        """
        loss_norm, norm = _norm(p.grad for p in penalty if p.grad is not None), _norm(penalty.values())
        factor = torch.full_like(norm, steps)
        if self._options.clip is not None:
            factor = (self._options.clip * loss_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=steps)
        return torch.where((loss_norm + norm).isfinite(), factor, math.nan)

    def _add(self, penalty: Mapping[nn.Parameter, Tensor], factor: Tensor) -> None:
        """Add the penalty's gradient to that of the loss."""
        for p, g in penalty.items():
            assert p.grad is not None
            p.grad.addcmul_(g.to(p.dtype), factor.to(p))

    def _compare_outputs(self) -> None:
        """See, once, that the copy which the curvature is read on computes what the model does."""
        graphs = (g for g in self._calls.graphs if g.has_gradient and g.call.training == self._inner.training)
        graph = next((graph for graph in graphs if graph.output is not None), None)
        self._calls.keeps_outputs = False
        if graph is None:
            return
        difference = self._difference(graph.call, graph.output)
        if difference > _DIFFERENT:  # not where values are not numbers, of which is told elsewhere
            warn_user(
                "the copy of the model on which FlatKFAC reads the curvature gives another output than the model did "
                f"(the difference is {difference:.0%} of its size), so the penalty is that of another function. It "
                "repeats no forward hooks and knows of no randomness but that of torch's global generators: put what "
                "changes the output into modules"
            )

    def _difference(self, call: RecordedCall, expected: Any) -> float:
        """Return by how much the twin's output differs from the model's.

        Without a graph, which takes memory; with one as well where a model does something else without gradients, as
        torch's encoders in eval mode, or cannot run, as one that differentiates in its forward pass.
        """

        def difference(graph: bool) -> float:
            output = self._tracker.output(call.args, call.kwargs, call.conditions, graph=graph)
            return largest_difference(output, expected)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the model itself would not have done
                without = difference(graph=False)
        except _CANNOT_RUN as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            without = math.inf
        return difference(graph=True) if without > _DIFFERENT else without

    def _scales_early(self, call: RecordedCall) -> bool:
        """Tell whether the gradient of rho is scaled on its way back, not afterwards.

        It is where it counts the same for all parameters that have a penalty, and no float16 on the way would lose
        what is small.
        """
        settings = {(self._setting(group, "mu"), self._setting(group, "rho_max")) for group in self.param_groups}
        in_half = call.autocast["enabled"] and call.autocast["dtype"] == torch.float16
        return len({(mu, rho_max) for mu, rho_max in settings if mu}) == 1 and not in_half

    def _scale(self, rho: Tensor) -> Tensor:
        """Return what the gradient of rho counts for all parameters that have a penalty."""
        return next(self._weight(group, rho) for group in self.param_groups if self._setting(group, "mu"))

    def _weights(self, rho: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return what the gradient of rho counts for each parameter, which depends on its group."""
        of_groups = [(group["params"], self._weight(group, rho)) for group in self.param_groups]
        return {p: weight for parameters, weight in of_groups for p in parameters}

    def _weight(self, group: Mapping[str, Any], rho: Tensor) -> Tensor:
        """Return the derivative of a group's penalty by rho: zero where rho does not exceed its rho_max."""
        slope = (rho > self._setting(group, "rho_max")).to(rho) * self._setting(group, "mu")
        return slope / rho.clamp(min=torch.finfo(rho.dtype).tiny) if self._options.penalty == "log" else slope

    def _rho_gradient(self, call: RecordedCall, parameters: list[nn.Parameter]) -> RadiusGradient:
        """Differentiate rho on a batch, or on the last of its micro-batches where the model does not run on all."""
        try:
            return self._rho_gradient_on_share(call, parameters)
        except _CANNOT_RUN as error:
            alone = self._calls.last_alone()
            if alone is None or alone is call or isinstance(error, torch.OutOfMemoryError):
                raise
            return self._rho_gradient_on_share(alone, parameters)

    def _rho_gradient_on_share(self, call: RecordedCall, parameters: list[nn.Parameter]) -> RadiusGradient:
        """Differentiate rho on the share of a batch that the options ask for, or on all of it where that cannot be."""
        size = call.batch_size
        examples = size if self._whole_batches else max(min(2, size), round(self._options.batch_fraction * size))
        try:
            return self._rho_gradient_on(call, parameters, examples)
        except _CANNOT_RUN as error:
            if examples >= size or isinstance(error, torch.OutOfMemoryError):
                raise
            gradient = self._rho_gradient_on(call, parameters, size)
            self._whole_batches = True
            warn_user(
                f"the model does not run on a part of its batch ({error}), so FlatKFAC takes whole batches from now "
                "on; say so with batch_fraction=1"
            )
            return gradient

    def _rho_gradient_on(self, call: RecordedCall, parameters: list[nn.Parameter], examples: int) -> RadiusGradient:
        """Differentiate rho on the first examples of a batch."""
        sampled = self._criterion_calls is None
        loss = self._sampled_loss if sampled else self._empirical_loss(call.batch_size, examples)
        args, kwargs = call.first(examples)

        def checked_loss(output: Any) -> Tensor:
            if call is not self._calls.last_alone() or examples < call.batch_size:
                _check_share(call, output, examples)
            return loss(output)

        refresh = self._steps // self._options.every
        # After a pause, what is known of the layers may be long out of date.
        survey = self._paused or refresh % self._options.survey_every == 0
        return self._tracker.gradient(
            args,
            kwargs,
            checked_loss,
            parameters,
            call.conditions,
            survey=survey,
            scale=self._scale if self._scales_early(call) else None,
        )

    def _count_skipped(self, finite: Tensor) -> None:
        """Count on the device; warn once the count has come back to the host."""
        if finite.device.type == "cpu" and finite:
            return
        known = self._skipped_host.peek()
        before = 0 if known is None else int(known)
        self._skipped = (~finite).long() + (0 if self._skipped is None else self._skipped)
        self._skipped_host.put(self._skipped)
        if self._skipped.device.type == "cpu":
            before = int(self._skipped)
        if before and not self._warned:
            self._warned = True
            warn_user(
                "FlatKFAC left the penalty out of a step because the loss, its gradients or the curvature were not "
                "finite; the wrapped optimizer stepped as it would have. Further cases are counted in "
                "FlatKFAC.skipped without a warning"
            )

    def _sampled_loss(self, output: Any) -> Tensor:
        """Losses, ``[N]``, whose gradients have the true Fisher for covariance."""
        losses = self._likelihood(prediction(output, self._options.likelihood), self._draw_generator())
        if losses.dim() != 1:
            raise ValueError(f"likelihood must return one loss per example, [N], not {list(losses.shape)}")
        return losses

    def _empirical_loss(self, batch_size: int, examples: int) -> Callable[[Any], Tensor]:
        """Sum of the criterion's example losses at the targets it was last called with."""
        criterion, calls = self._options.criterion, self._criterion_calls
        call = None if calls is None else calls.last(batch_size)
        if call is None or criterion is None:
            raise RuntimeError(
                'fisher="empirical" takes the targets from the criterion: call the very module given as criterion= '
                "as criterion(model(x), y) before step()"
            )
        reduction = getattr(criterion, "reduction", None)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"{type(criterion).__name__} does not say how it reduces over the batch: give it an attribute "
                '`reduction` that is "mean", "sum" or "none"'
            )
        if call.batch_size != batch_size:
            raise RuntimeError(
                f"the criterion was last called on {call.batch_size} examples and the model on {batch_size}: with "
                'fisher="empirical", call criterion(model(x), y) on the same batch'
            )
        factor = examples if reduction == "mean" else 1
        repeated = call.with_other_output(criterion, examples)
        return lambda output: repeated(output).sum() * factor

    def _draw_generator(self) -> torch.Generator:
        """Make the generator of a refresh: other draws at each and in each process, alike however often it is made."""
        device = next(self._inner.parameters()).device
        # Far-apart multiples, so that no seed's refresh meets another's.
        number = self._options.seed * 1_000_003 + self._steps * 7_368_787 + rank() * 2_147_483_647
        return torch.Generator(device).manual_seed(number % 2**63)

    def _attach_recorders(self) -> tuple[CallRecorder, CallRecorder | None]:
        """Watch the calls of model and criterion, only when the next step will use them."""
        optimizer = weakref.ref(self)

        def wanted() -> bool:
            alive = optimizer()
            if alive is None or not alive._refreshes_next():
                return False
            if all(p.grad is None for p in alive._all_parameters()):  # cleared by somebody else than zero_grad()
                for calls in alive._recorders():
                    calls.forget_finished()
            return True

        calls = CallRecorder.attach(self.model, wanted, owner=self)
        if self._options.fisher == "sampled" or self._options.criterion is None:
            return calls, None
        return calls, CallRecorder.attach(self._options.criterion, wanted, owner=self, source=calls)

    def _forget_calls(self) -> None:
        """Let go of the batch, which is of no use any more."""
        for calls in self._recorders():
            calls.forget()

    def _recorders(self) -> list[CallRecorder]:
        """Return those who watch the calls of model and criterion."""
        return [calls for calls in (self._calls, self._criterion_calls) if calls is not None]

    def _refreshes_next(self) -> bool:
        """Tell whether the next step computes the penalty's gradient."""
        return (self._is_regular() or self._paused) and self._has_penalty()

    def _is_regular(self) -> bool:
        """Tell whether the next step is one of those that compute the penalty's gradient whatever came before."""
        return self._steps % self._options.every == 0

    def _has_penalty(self) -> bool:
        """Tell whether mu is above zero for any group at this step."""
        return any(self._setting(group, "mu") != 0 for group in self.param_groups)

    def _setting(self, group: Mapping[str, Any], name: str) -> float:
        """Return mu or rho_max of a group of parameters at this step: its own, if it has an entry of that name."""
        schedule = group.get(name, getattr(self._options, name))
        value = schedule(self._steps) if callable(schedule) else schedule
        if not _is_number(value, 0, math.inf):
            raise ValueError(f"mu and rho_max must be numbers >= 0 at every step, but {name} is {value!r}")
        return float(value)

    # ---------------------------------------------------------------- following a cut

    def prepare_cut(self, kept: Mapping[str, Kept], select: Select) -> list[Change]:
        """Work out what a cut leaves of the eigenvectors and of the penalty's gradient at masks, before it happens.

        Args:
            kept: What remains of each module that loses channels, by name.
            select: Cuts a tensor of a parameter's shape as that parameter will be cut.

        Returns:
            What puts the result in place, to be made together with the cut of the parameters.
        """
        kept = kept_by_projections(self._inner, kept)
        return [
            *self._tracker.prepare_cut(kept, select),
            setting(self, {"_mask_terms": self._mask_terms.index_select(kept)}),
            *(setting(calls, {"graphs": []}) for calls in self._recorders()),
        ]

    def keep_removed(self, kept: Mapping[str, Kept], join: Join) -> Callable[[], list[Change]]:
        """Remember what a cut that is about to happen takes from the eigenvectors and the penalty's gradient at masks.

        Args:
            kept: What remains of each module that loses channels, by name.
            join: Remembers what a tensor of a parameter's shape loses, and returns a function that joins it again.

        Returns:
            A function that prepares to put it back. Of a penalty computed since then that lacks a part nothing is kept:
            it has been added for all steps until the next is computed.
        """
        kept = kept_by_projections(self._inner, kept)
        put_back_vectors, before = self._tracker.keep_removed(kept, join), self._mask_terms

        def put_back() -> list[Change]:
            whole = before.joined_to(self._mask_terms, kept)
            return [
                *put_back_vectors(),
                setting(self, {"_mask_terms": whole or MaskTerms()}),
                *(setting(calls, {"graphs": []}) for calls in self._recorders()),
            ]

        return put_back

    # ---------------------------------------------------------------- checkpoints and copies

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict with an entry ``"kfac_flat"`` added, plain tensors and numbers.

        The wrapped optimizer alone can load it as well.
        """
        own = {
            "steps": self._steps,
            "paused": self._paused,
            "skipped": self.skipped,
            **self._mask_terms.state_dict(),
            **self._tracker.state_dict(),
        }
        return {**self.base.state_dict(), "kfac_flat": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict of FlatKFAC, or one of the bare wrapped optimizer, whose curvature then starts afresh.

        Raises:
            ValueError: if it belongs to another model; nothing has changed then.
        """
        own = state_dict.get("kfac_flat")
        if own is not None:
            self._check_own(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "kfac_flat"})
        self._load_own(own)

    def _check_own(self, own: Mapping[str, Any]) -> None:
        """See that the curvature's part of a checkpoint fits this model."""
        self._tracker.check_state_dict(own)
        if not MaskTerms.from_state_dict(own, torch.device("meta")).fits(self._inner):
            raise ValueError(
                "the checkpoint's penalty is that of other layers: load the pruner's state into the dense model first, "
                "then the optimizer's"
            )

    def _load_own(self, own: Mapping[str, Any] | None) -> None:
        """Restore the curvature's part of a checkpoint, or start afresh."""
        self._steps, self._skipped = 0, None
        self._forget_penalty()
        self._forget_calls()
        self._tracker.reset()
        if own is None:
            return
        device = self._all_parameters()[0].device
        self._steps, self._paused = own["steps"], own["paused"]
        self._skipped = torch.tensor(own["skipped"], device=device)
        self._mask_terms = MaskTerms.from_state_dict(own, device)
        self._tracker.load_state_dict(own)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "model": self.model,
            "options": vars(self._options),
            "own": self.state_dict()["kfac_flat"],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state:
            super().__setstate__(state)
            return
        FlatKFAC.__init__(self, state["base"], state["model"], **state["options"])
        self._load_own(state["own"])


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all entries, in single precision at least: that of large tensors exceeds what float16 can hold."""
    half = (torch.float16, torch.bfloat16)
    return get_total_norm([torch.linalg.vector_norm(t, dtype=torch.float32) if t.dtype in half else t for t in tensors])


def _check_share(call: RecordedCall, output: Any, examples: int) -> None:
    """See that an output may be that of the first examples of a call."""
    if not call.has_its_share(output, examples):
        raise ValueError("its output does not grow with its arguments' first axis, so that is none of examples")


def _warn_of_memory(error: torch.OutOfMemoryError, examples: int, fraction: float) -> None:
    """Say that a penalty had to be left out, and how to have it again."""
    warn_user(
        f"out of memory for the curvature of {max(1, round(fraction * examples))} of {examples} examples, so FlatKFAC "
        "leaves the penalty out until it computes it anew; the wrapped optimizer steps as it would have. Give FlatKFAC "
        f"a smaller batch_fraction, such as {fraction / 2:g} ({error})"
    )
