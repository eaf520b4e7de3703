"""SNIP: weights go once, before training, by what connections do to the loss [Lee et al., arXiv 1810.02340]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.weight import WeightPruner
from kfac_flat.curvature.twin import Twin


class SNIP(WeightPruner):
    """Remove at initialisation the connections to which the loss is least sensitive, and train what is left.

    With a mask c on the weights, a connection's sensitivity is ``|dL/dc|`` at c = 1, which is ``|w dL/dw|`` [eq. 4-5];
    connections of all layers compete. L is the mean over the batches given: one batch in the paper, or more.
    All that goes, goes when this object is made; ``step()`` removes nothing more, and is there for loops that call it
    on any pruner.

    Args:
        model: The model about to be trained. Its buffers, mode and gradients are left as they are.
        optimizer: Any torch optimizer over its parameters.
        batches: Batches ``(x, y)`` of training data, at least one.
        criterion: From the model's output and y to the loss.
        target: Share of the weights to remove, in (0, 1).
        ignore: Layers whose weights stay: names (shell patterns allowed) or classes.

    Raises:
        TypeError: if ``model`` or ``optimizer`` is of another kind.
        ValueError: as WeightPruner does, or if there is no batch or a sensitivity is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> SNIP(model, optimizer, [batch], nn.CrossEntropyLoss(), target=0.75).sparsity
        0.75
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Iterable[tuple[Tensor, Tensor]],
        criterion: Callable[[Any, Tensor], Tensor],
        *,
        target: float,
        ignore: Any = (),
    ) -> None:
        super().__init__(model, optimizer, target=target, start=1, every=1, events=1, ignore=ignore)
        self._sensitivity = connection_sensitivity(self._model, self._weights, batches, criterion)
        super().step()
        self._epoch, self.history = 0, []

    def scores(self) -> dict[str, Tensor]:
        """Sensitivities as they were before training."""
        return self._sensitivity


def connection_sensitivity(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: Callable[[Any, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Absolute derivative of the mean loss with respect to masks on weights, by name, of the weights' shapes.

    Raises:
        ValueError: if there is no batch, or the result is not finite.
    """
    twin, count = Twin(model, []), 0
    total = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
    with torch.random.fork_rng():
        for x, y in batches:
            _, loss = twin.run((x,), {}, functools.partial(_loss, criterion, y))
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            for own, gradient in zip(total.values(), gradients, strict=True):
                own += gradient
            count += 1
    if not count:
        raise ValueError("SNIP needs at least one batch (x, y) of training data")
    found = {name: (w.detach() * total[name] / count).abs() for name, w in weights.items()}
    if not all(bool(s.isfinite().all()) for s in found.values()):
        raise ValueError(
            "the loss, or its gradient, is not finite on the batches given: look for inf and nan in data and weights"
        )
    return found


def _loss(criterion: Callable[[Any, Tensor], Tensor], y: Tensor, output: Any) -> Tensor:
    return criterion(output, y)
