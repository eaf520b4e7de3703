"""Losses whose labels come from the model itself: the true Fisher needs gradients at sampled labels, not at the data's.

Each function takes the model's output ``[N, ...]`` and a random generator on its device, draws one label per
prediction from the distribution that the output describes, and returns the negative log-likelihoods of the N examples,
``[N]``, differentiable in the output [Martens & Grosse 2015, section 2].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Likelihood = Callable[[Tensor, torch.Generator], Tensor]


def categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Softmax cross-entropy; classes on axis 1 as in ``nn.CrossEntropyLoss``, further axes averaged as it does."""
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
    with torch.no_grad():  # Gumbel-max: argmax of log-probability plus Gumbel noise, no host synchronisation
        labels = (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(1)
    return _per_example(F.cross_entropy(logits, labels, reduction="none")).mean(1)


def gaussian(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Half the squared distance to a draw from a Gaussian of unit variance around the output, summed over its axes."""
    mean = _at_least_float32(mean)
    with torch.no_grad():
        labels = mean + torch.empty_like(mean).normal_(generator=generator)
    return _per_example(0.5 * (mean - labels).square()).sum(1)


def bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Binary cross-entropy of independent logits, summed over the output's axes."""
    logits = _at_least_float32(logits)
    with torch.no_grad():
        uniform = torch.empty_like(logits).uniform_(generator=generator)
        labels = (uniform < logits.sigmoid()).to(logits.dtype)
    return _per_example(F.binary_cross_entropy_with_logits(logits, labels, reduction="none")).sum(1)


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
            "(output, generator) -> negative log-likelihoods [N] at labels it draws itself"
        )
    return LIKELIHOODS[likelihood]


def _at_least_float32(output: Tensor) -> Tensor:
    """In half precision, labels drawn would not follow the distribution that the output describes."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _per_example(losses: Tensor) -> Tensor:
    """View losses ``[N, ...]`` as ``[N, predictions]``."""
    return losses.reshape(len(losses), -1)
