"""rho of a model on a batch, for looking at: no optimizer, no training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from kfac_flat.curvature.likelihood import Likelihood, prediction, resolve
from kfac_flat.curvature.tracker import RadiusTracker
from kfac_flat.curvature.twin import layer_names
from kfac_flat.structure import unwrap


@torch.inference_mode(False)  # it differentiates, wherever it is called
def spectral_radii(
    model: nn.Module,
    *inputs: Any,
    likelihood: str | Likelihood = "categorical",
    layers: Iterable[str | type[nn.Module]] | None = None,
    exact: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the spectral radius of each layer's Kronecker block on a batch, with the true Fisher.

    The model, its mode and its buffers stay as they are; ``max`` of the values is rho [HGNP eq. 3]. It may be called
    in ``torch.inference_mode()``, but not with a model that was made in it.

    Args:
        model: The model, in the mode (train or eval) in which it is to be measured.
        inputs: What it is called with.
        likelihood: What its output means, as for :class:`FlatKFAC`.
        layers: Names (shell patterns allowed) or classes to restrict to.
        exact: Form and decompose the factors instead of 100 steps of power iteration.
        seed: Of the true Fisher's random signs and the starting vectors.

    Returns:
        lambda_max(A_l) lambda_max(G_l) by module name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> sorted(spectral_radii(model, torch.randn(16, 4)))
        ['0', '2']
    """
    inner = unwrap(model)
    draw = resolve(likelihood)
    generator = torch.Generator(next(inner.parameters()).device).manual_seed(seed)
    tracker = RadiusTracker(inner, layer_names(inner, layers), reduction="max", exact=exact, seed=seed)
    with torch.random.fork_rng(devices=[]):  # dropout must not move the user's generator
        tracker.measure(inputs, {}, lambda output: draw(prediction(output, likelihood), generator), steps=100)
    return {name: float(radius) for name, radius in tracker.radii.items()}
