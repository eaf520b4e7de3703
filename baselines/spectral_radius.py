"""Spectral radius regularisation with the Hessian itself [Sandler, Klabjan & Luo, arXiv 2102.11210]."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from kfac_flat import FlatKFAC
from kfac_flat.changes import Change, setting
from kfac_flat.curvature.tracker import Join, RadiusGradient, Scale, Select, Tracker
from kfac_flat.curvature.twin import Conditions, Twin
from kfac_flat.nested import batch_size
from kfac_flat.optimizer import Schedule
from kfac_flat.pruning import layers
from kfac_flat.pruning.saliency import mask_gradient
from kfac_flat.structure import Kept
from kfac_flat.wrapper import refuse_several_processes

# Power steps on the very first batch, from a random vector; afterwards a few per batch track the moving eigenvector.
_FIRST_STEPS = 20


class SpectralRadius(FlatKFAC):
    """Wrap a torch optimizer so that it also minimises the spectral radius of the loss's Hessian.

    As :class:`kfac_flat.FlatKFAC` in all respects but one: rho, in ``loss + mu * max(0, rho - K)``, is the largest
    absolute eigenvalue of the Hessian of the batch's mean loss with respect to all parameters that are stepped, and no
    layer is approximated or left out. Its eigenvector v is followed by power iteration on Hessian-vector products, from
    where the refresh before ended; its gradient ``v^T (dH) v`` takes a third backward pass [section 3].

    Args:
        optimizer: An optimizer instance over (some of) the model's parameters.
        model: The model being trained.
        criterion: The loss module, called in the training loop as ``criterion(model(x), y)``.
        mu: Weight of the penalty, or a function of the step count.
        rho_max: K, the spectral radius below which there is no penalty, or a function of the step count.
        every: Steps from one computation of the penalty's gradient to the next.
        batch_fraction: Share of the batch, in (0, 1], that it is computed on; at least two examples.
        clip: Bound on the norm of the penalty's gradient, relative to that of the loss; None for no bound.
        iterations: Power steps at each refresh; at least twenty at the first.
        seed: Of the starting vector. torch's global generators are never touched.

    Raises:
        TypeError: if ``optimizer`` is no optimizer instance or ``model`` no module.
        ValueError: if an option is out of range, or the optimizer's parameters are not the model's.

    Example:
        >>> model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
        >>> optimizer = SpectralRadius(torch.optim.SGD(model.parameters(), lr=0.1), model, criterion, mu=0.01)
        >>> criterion(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> optimizer.rho > 0
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        criterion: nn.Module,
        *,
        mu: Schedule = 0.01,
        rho_max: Schedule = 0.0,
        every: int = 1,
        batch_fraction: float = 1.0,
        clip: float | None = 1.0,
        iterations: int = 2,
        seed: int = 0,
    ) -> None:
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations={iterations!r} must be a whole number of power steps, at least 1")
        penalty: dict[str, Any] = {
            "criterion": criterion,
            "mu": mu,
            "rho_max": rho_max,
            "every": every,
            "batch_fraction": batch_fraction,
            "clip": clip,
            "seed": seed,
        }
        self._iterations = iterations
        super().__init__(optimizer, model, fisher="empirical", penalty="linear", **penalty)
        refuse_several_processes(self)
        self._own_options = {**penalty, "iterations": iterations}

    def _make_tracker(self) -> Tracker:
        return HessianTracker(self._inner, self._iterations, self._options.seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self._own_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state:
            super().__setstate__(state)
            return
        SpectralRadius.__init__(self, state["base"], state["model"], **state["options"])
        self._load_own(state["own"])


class HessianTracker:
    """Follows the eigenvalue of largest absolute value of a model's Hessian, as RadiusTracker does those of its layers.

    Args:
        model: The user's model, free of wrappers.
        iterations: Power steps at each batch.
        seed: Of the starting vector.

    Attributes:
        eigenvectors: The entries of the one eigenvector that belong to each parameter.
        radii: Its absolute eigenvalue as last seen, under the name of the model, which is empty.
        skipped: Layers left out: none.
    """

    def __init__(self, model: nn.Module, iterations: int, seed: int) -> None:
        self._model, self._iterations, self._seed = model, iterations, seed
        self._twin: Twin | None = None
        self.eigenvectors: dict[nn.Parameter, Tensor] = {}
        self.radii: dict[str, Tensor] = {}
        self.skipped: dict[str, str] = {}

    def rho(self) -> Tensor | None:
        """Return rho as last seen, a scalar; None before the first batch."""
        return self.radii.get("")

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
        """Differentiate rho on a batch, bringing the eigenvector up to date on the way.

        Args:
            args: Positional arguments of the model's forward.
            kwargs: Keyword arguments of it.
            loss: From the model's output to the sum of the example losses.
            parameters: With respect to which the Hessian is taken, and its radius differentiated.
            conditions: Makes the context, of randomness and precision, that the forward pass runs in.
            survey: Means nothing here, where there are no layers to choose from.
            scale: What the gradient is multiplied by, given rho; None for 1.
        """
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            self._twin = Twin.current(self._twin, self._model, [])
            _, total = self._twin.run(args, kwargs, loss, conditions)
        mean = total / batch_size((args, kwargs))
        v, product = self._power_iteration(mean, parameters)
        quotient = torch.stack([(x * y).sum() for x, y in zip(v, product, strict=True)]).sum()
        sign, rho = quotient.detach().sign(), quotient.detach().abs()
        found: tuple[Tensor | None, ...] = ()
        if quotient.requires_grad:
            outer = sign if scale is None else sign * scale(rho)
            found = torch.autograd.grad(quotient, parameters, outer, allow_unused=True)
        self.eigenvectors, self.radii = dict(zip(parameters, v, strict=True)), {"": rho}
        gradients = {p: g for p, g in zip(parameters, found, strict=False) if g is not None}
        return RadiusGradient(rho, gradients, self._input_masks(rho), scale is not None)

    def output(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], conditions: Conditions, *, graph: bool) -> Any:
        """Return what the copy of the model that is differentiated gives."""
        self._twin = Twin.current(self._twin, self._model, [])
        return self._twin.output(args, kwargs, conditions, graph=graph)

    def _power_iteration(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
        """Return a unit vector close to the eigenvector, and the Hessian times it, which has a graph."""
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)

        def hessian_times(v: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
            pairs = [(g, x) for g, x in zip(gradients, v, strict=True) if g.requires_grad]
            if not pairs:  # the loss is linear
                return [torch.zeros_like(p) for p in parameters]
            of, with_ = zip(*pairs, strict=True)
            return list(
                torch.autograd.grad(
                    of, parameters, with_, retain_graph=True, create_graph=create_graph, materialize_grads=True
                )
            )

        v, steps = self._start(parameters)
        for _ in range(steps):
            v = _unit(hessian_times(v, create_graph=False), instead=v)
        return v, hessian_times(v, create_graph=True)

    def _start(self, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor], int]:
        """Return where to begin, and how many power steps to take from there."""
        known = [self.eigenvectors.get(p) for p in parameters]
        if all(v is not None and v.shape == p.shape for v, p in zip(known, parameters, strict=True)):
            v = [v.to(p) for v, p in zip(known, parameters, strict=True) if v is not None]
            return _unit(v, instead=v), self._iterations
        generator = torch.Generator().manual_seed(self._seed)
        v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters]
        return _unit(v, instead=v), max(_FIRST_STEPS, self._iterations)

    def _input_masks(self, rho: Tensor) -> dict[str, Tensor]:
        """Gradient of rho at masks on layers' inputs that does not go through the weights, ``[C_in]``, by name.

        A mask m scales the rows and columns of the Hessian that belong to the weights reading it, so that the
        derivative of v^T H v is 2 rho times the sum of v^2 over those weights.
        """
        masks: dict[str, Tensor] = {}
        left = dict(self.eigenvectors)  # a weight that layers share is counted once
        for name, module in self._model.named_modules():
            if layers.is_producer(module) and not layers.is_attention(module):
                v = left.pop(layers.weight_of(module), None)
                if v is not None:
                    v = v.transpose(0, 1) if isinstance(module, layers.TRANSPOSED) else v
                    masks[name] = 2 * rho * mask_gradient(v, v, int(getattr(module, "groups", 1)))
        return masks

    def prepare_cut(self, kept: Mapping[str, Kept], select: Select) -> list[Change]:
        """Work out what a cut that is still to come leaves of the eigenvector."""
        return [setting(self, {"eigenvectors": {p: select(p, v) for p, v in self.eigenvectors.items()}})]

    def keep_removed(self, kept: Mapping[str, Kept], join: Join) -> Callable[[], list[Change]]:
        """Remember what a cut that is still to come takes of the eigenvector, to be put back."""
        removed = {p: join(p, v) for p, v in self.eigenvectors.items()}

        def put_back() -> list[Change]:
            vector = {p: removed[p](v) for p, v in self.eigenvectors.items() if p in removed}
            return [setting(self, {"eigenvectors": vector})]

        return put_back

    def reset(self) -> None:
        """Forget everything seen."""
        self.eigenvectors, self.radii = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Eigenvector and radius as plain tensors."""
        names = {p: name for name, p in self._model.named_parameters()}
        return {"eigenvectors": {names[p]: v for p, v in self.eigenvectors.items()}, "radii": dict(self.radii)}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """See that :meth:`load_state_dict` can load this.

        Raises:
            ValueError: if a parameter is unknown or has another shape.
        """
        parameters = dict(self._model.named_parameters())
        for name, v in state["eigenvectors"].items():
            if name not in parameters or parameters[name].shape != v.shape:
                raise ValueError(
                    f"the checkpoint's eigenvector does not fit {name!r}: load the pruner's state into the dense model "
                    "first, then the optimizer's"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        parameters = dict(self._model.named_parameters())
        self.eigenvectors = {parameters[n]: v.to(parameters[n], copy=True) for n, v in state["eigenvectors"].items()}
        device = next(iter(parameters.values())).device
        self.radii = {name: r.to(device, copy=True) for name, r in state["radii"].items()}


def _unit(v: Sequence[Tensor], instead: Sequence[Tensor]) -> list[Tensor]:
    """Scale a vector over all parameters to length one; one without a direction is replaced."""
    norm = get_total_norm(list(v))
    usable = norm.isfinite() & (norm > 0)
    return [torch.where(usable, x / norm, y) for x, y in zip(v, instead, strict=True)]
