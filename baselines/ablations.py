"""The two halves of the method alone: the penalty in Theta only, or in training only [HGNP sec. 4.3].

[HGNP] is Ebrahimi & Klabjan, arXiv 2111.08577. Each ablation is an optimizer; the pruner is NeuronPruner itself, which
reads gradients as they are stepped on and asks the optimizer what is to be counted beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kfac_flat import FlatKFAC


class PenaltyInThetaOnly(FlatKFAC):
    """Train on the loss alone (mu = 0), and let NeuronPruner score by loss plus penalty: the first ablation.

    Computes what FlatKFAC does and adds none of it to the gradients, so that the trajectory up to the first removal is
    the wrapped optimizer's, bit for bit.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = PenaltyInThetaOnly(torch.optim.SGD(model.parameters(), lr=0.1), model, mu=0.01)
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> before = model[0].weight.grad.clone()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight.grad, before)
        True
    """

    def _add(self, penalty: Mapping[nn.Parameter, Tensor], factor: Tensor) -> None:
        """Add nothing."""

    def input_mask_gradients(self) -> dict[nn.Parameter, Tensor]:
        """Gradient of the penalty at masks on layers' inputs, ``[C_in]``, by the layer's weight."""
        return self._mask_terms.by_weight(self._inner, 1, 1)


class PenaltyInTrainingOnly(FlatKFAC):
    """Train on loss plus penalty, and let NeuronPruner score by the loss alone (mu = 0 in Theta): the second ablation.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer = PenaltyInTrainingOnly(torch.optim.SGD(model.parameters(), lr=0.1), model, mu=0.01)
        >>> nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
        >>> before = model[0].weight.grad.clone()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight.grad, before)
        False
    """

    def input_mask_gradients(self) -> dict[nn.Parameter, Tensor]:
        """What takes the penalty out of the gradients again, at masks on layers' inputs, ``[C_in]``, by weight."""
        return self._mask_terms.by_weight(self._inner, 0, -self._held)
