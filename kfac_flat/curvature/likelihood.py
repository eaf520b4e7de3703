"""Losses for the true Fisher, whose labels would come from the model's own prediction and not from the data.

The Fisher is the covariance of the gradient at such labels [Martens & Grosse 2015, section 2]. To draw one label per
prediction tells little of it once a model is confident: nearly all draws give a gradient close to zero, and a rare one
gives all the rest. So instead of choosing between the labels' gradients g_k, of probability p_k, these functions add
them up with random signs, sum_k +-sqrt(p_k) g_k, which has the same covariance, sum_k p_k g_k g_k^T, and no rare draws.

Each takes the model's output ``[N, ...]`` and a random generator on its device, and returns a loss for each of the N
examples, ``[N]``, of which only the gradient at the output means something. It can be differentiated in turn: the signs
are held then and the probabilities are not, so that on average over the signs it comes to the derivative of the Fisher,
all of it. With labels drawn and held, how the prediction decides what is drawn would be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import logsigmoid

Likelihood = Callable[[Tensor, torch.Generator], Tensor]


def categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Softmax cross-entropy; classes on axis 1 as in ``nn.CrossEntropyLoss``, further axes averaged as it does.

    The gradients at the labels are ``p - e_k``, p the probabilities.
    """
    if logits.dim() < 2:
        raise ValueError(
            f'likelihood="categorical" needs logits of shape [N, classes, ...], not {list(logits.shape)}; '
            'for a single logit per example use likelihood="bernoulli"'
        )
    if logits.shape[1] == 1:
        raise ValueError(
            "a softmax over one class is constant, so there is no curvature: for one logit per example use "
            'likelihood="bernoulli", for regression likelihood="gaussian"'
        )
    logits = _at_least_float32(logits)
    root = (logits.log_softmax(1) / 2).exp()  # the root of a probability that underflows has no derivative
    signed = root * _signs(root, generator)
    return _losses(logits, root.square() * signed.sum(1, keepdim=True) - signed) / logits.shape[2:].numel()


def gaussian(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Half the squared distance to a Gaussian label of unit variance around the output, summed over its axes."""
    mean = _at_least_float32(mean)
    return _losses(mean, _signs(mean, generator))


def bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Binary cross-entropy of independent logits, summed over the output's axes.

    The two gradients of a logit are one number but for a factor, so that its variance p (1 - p) comes out exactly.
    """
    logits = _at_least_float32(logits)
    deviation = ((logsigmoid(logits) + logsigmoid(-logits)) / 2).exp()  # the root of p (1 - p)
    return _losses(logits, deviation * _signs(logits, generator))


LIKELIHOODS: dict[str, Likelihood] = {"categorical": categorical, "gaussian": gaussian, "bernoulli": bernoulli}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """Look a likelihood up by name; a callable is taken as it is.

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(likelihood):
        return likelihood
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood {likelihood!r} is unknown: choose one of {sorted(LIKELIHOODS)} or give a callable "
            "(output, generator) -> losses [N], such as negative log-likelihoods at labels it draws itself"
        )
    return LIKELIHOODS[likelihood]


def prediction(output: Any, likelihood: str | Likelihood) -> Any:
    """Return what a likelihood is given of a model's output.

    A named one is given the output itself, or the ``"logits"`` among several; a callable all that there is.

    Raises:
        TypeError: if a named one would be given no tensor.

    Example:
        >>> prediction({"loss": torch.tensor(0.7), "logits": torch.tensor([[1.0, 2.0]])}, "categorical")
        tensor([[1., 2.]])
    """
    if callable(likelihood):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__} without logits, so that no part of it is known to be the "
            "prediction: give likelihood= a callable (output, generator) -> negative log-likelihoods [N], for example "
            "lambda output, generator: kfac_flat.likelihood.categorical(output[0], generator)"
        )
    return found


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw -1 or 1 for each entry."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _at_least_float32(output: Tensor) -> Tensor:
    """In half precision, small probabilities would be lost."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _losses(output: Tensor, gradient: Tensor) -> Tensor:
    """Return losses ``[N]`` whose gradient at the output ``[N, ...]`` is the one given, graph and all."""
    losses: Tensor = _WithGradient.apply(output, gradient)  # type: ignore[no-untyped-call]
    return losses


class _WithGradient(torch.autograd.Function):
    """Losses of which only the gradient is known, which need be that of no function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return reduce(gradient * output, "n ... -> n", "sum")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient, None
