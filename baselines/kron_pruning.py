"""Optimal brain damage and surgery for whole neurons: C-OBD, C-OBS, Kron-OBD and Kron-OBS.

These are what EigenDamage is compared with [Wang et al., arXiv 1905.05934, sections 2 and 3]. Around a minimum the loss
rises by half of vec(dW)^T F vec(dW), F the Fisher, when the weights of a layer change by dW. Here W ``[groups, d_out,
d_in]`` is the layer's weight, one matrix per group of a convolution, and its bias joins as the weight of an input that
is always 1. To remove a neuron is to set its row of W to zero.

- C-OBD takes F to be diagonal, so that the effects of single weights add up.
- C-OBS lets the remaining weights compensate for each single weight that goes, as if it were the only one
  [Hassibi & Stork 1993], F = A (x) G, and adds up the effects over the row.
- Kron-OBD removes the row as a whole, F = A (x) G.
- Kron-OBS lets the remaining rows compensate for it in the best possible way.

Importances are twice the rise of the loss. The factor does not change which neurons go.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.fisher import fisher_statistics
from baselines.layerwise import LayerwisePruner
from kfac_flat.changes import Change
from kfac_flat.curvature.layers import Layer, groups_of, input_patches, is_layer, output_factor, output_gradients
from kfac_flat.curvature.likelihood import Likelihood
from kfac_flat.curvature.radius import LayerData
from kfac_flat.pruning.graph import kept_without
from kfac_flat.pruning.layers import is_producer
from kfac_flat.pruning.remaining import Removal
from kfac_flat.pruning.surgery import module_cut, select
from kfac_flat.structure import Kept, unwrap

# ---------------------------------------------------------------- importances, [groups, d_out]


def channel_obd_importance(W: Tensor, F: Tensor) -> Tensor:
    """Sum W_ij^2 F_ij over each row, F ``[groups, d_out, d_in]`` the diagonal of the Fisher."""
    return (W.square() * F).sum(-1)


def channel_obs_importance(W: Tensor, A_inverse: Tensor, G_inverse: Tensor) -> Tensor:
    """Sum W_ij^2 / [F^-1]_ij,ij over each row, F^-1 = A^-1 (x) G^-1."""
    return (W.square() / _diagonal_of_product(A_inverse, G_inverse)).sum(-1)


def kron_obd_importance(W: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """G_oo w_o^T A w_o for each row w_o."""
    return torch.einsum("goi,gij,goj->go", W, A, W) * _diagonal(G)


def kron_obs_importance(W: Tensor, A: Tensor, G_inverse: Tensor) -> Tensor:
    """w_o^T A w_o / [G^-1]_oo for each row w_o: the least that removing it can cost."""
    return torch.einsum("goi,gij,goj->go", W, A, W) / _diagonal(G_inverse)


# ---------------------------------------------------------------- compensation, [groups, d_out, d_in]


def channel_obs_update(W: Tensor, A_inverse: Tensor, G_inverse: Tensor, gone: Tensor) -> Tensor:
    """Add to W what single-weight surgery does for each weight of the rows that go, each as if it were the only one.

    Args:
        W: ``[groups, d_out, d_in]``.
        A_inverse: ``[groups, d_in, d_in]``.
        G_inverse: ``[groups, d_out, d_out]``.
        gone: Whether each row goes, ``[groups, d_out]``, bool.

    Returns:
        The remaining rows as they should be; those that go are zero.
    """
    multipliers = W / _diagonal_of_product(A_inverse, G_inverse) * gone[..., None]
    return (W - G_inverse @ multipliers @ A_inverse) * ~gone[..., None]


def kron_obs_update(W: Tensor, G: Tensor, gone: Tensor) -> Tensor:
    """Minimise vec(dW)^T (A (x) G) vec(dW) over the remaining rows when the others go; A has no part in the minimiser.

    For one row it is the paper's formula; rows that go together are compensated for jointly.

    Args:
        W: ``[groups, d_out, d_in]``.
        G: ``[groups, d_out, d_out]``, positive definite.
        gone: Whether each row goes, ``[groups, d_out]``, bool.

    Returns:
        The remaining rows as they should be; those that go are zero.
    """
    updated = torch.zeros_like(W)
    for w, G_g, out, new in zip(W, G, gone, updated, strict=True):
        new[~out] = w[~out] + torch.linalg.solve(G_g[~out][:, ~out], G_g[~out][:, out] @ w[out])
    return updated


def damped(M: Tensor, damping: float) -> Tensor:
    """Add a share ``damping`` of the mean eigenvalue to all eigenvalues of M ``[groups, d, d]``."""
    shift = damping * _diagonal(M).mean(-1, keepdim=True)
    return M + torch.diag_embed(shift.clamp(min=torch.finfo(M.dtype).tiny).expand(M.shape[:-1]))


def _diagonal(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1)


def _diagonal_of_product(A: Tensor, G: Tensor) -> Tensor:
    return torch.einsum("go,gi->goi", _diagonal(G), _diagonal(A))


# ---------------------------------------------------------------- what is read of a layer


def weight_matrix(layer: Layer) -> Tensor:
    """View weight and bias as ``[groups, d_out, d_in]``, the bias last; float64, without a graph."""
    weight = rearrange(layer.weight.detach(), "(g o) ... -> g o (...)", g=groups_of(layer))
    if layer.bias is None:
        return weight.double()
    return torch.cat([weight, rearrange(layer.bias.detach(), "(g o) -> g o 1", g=groups_of(layer))], -1).double()


def inputs_and_one(data: LayerData) -> Tensor:
    """Return what W is multiplied with, ``[N, groups, d_in, T]``, the bias's 1 last."""
    patches = input_patches(data.layer, data.a)
    return patches if data.layer.bias is None else nn.functional.pad(patches, (0, 0, 0, 1), value=1.0)


def kronecker_factors(data: LayerData) -> tuple[Tensor, Tensor]:
    """Form A and G."""
    inputs = inputs_and_one(data)
    return torch.einsum("ngit,ngjt->gij", inputs, inputs) / len(inputs), output_factor(data.layer, data.g)


def fisher_diagonal(data: LayerData) -> tuple[Tensor]:
    """Form the diagonal of the Fisher, ``[groups, d_out, d_in]``: squares of the examples' own gradients."""
    gradients = torch.einsum("ngot,ngit->ngoi", output_gradients(data.layer, data.g), inputs_and_one(data))
    return (gradients.square().mean(0),)


# ---------------------------------------------------------------- pruners

_UNREAD = "is neither a Linear nor a Conv2d, or shares its weight, so that its Kronecker factors are not read"


class CurvaturePruner(LayerwisePruner):
    """Score neurons by the Fisher over a data set, read whenever a removal is due; all else is as in NeuronPruner.

    Only Linear and Conv2d layers that are called once per forward have neurons that can go, and that share no weight.
    Where a BatchNorm follows a layer, the neuron's bias there goes along without being counted, as in the paper. In a
    run of several processes all must be given the same data in the same order.

    Args:
        model: See :class:`kfac_flat.NeuronPruner`.
        optimizer: See there.
        example_inputs: See there.
        data: Batches, as a DataLoader yields them; see ``baselines.fisher.fisher_statistics``.
        likelihood: What the model's output means, as for :class:`kfac_flat.FlatKFAC`.
        seed: Of the labels drawn.
        ignore: See :class:`kfac_flat.NeuronPruner`.
        options: All others, see there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        data: Iterable[Any],
        *,
        likelihood: str | Likelihood = "categorical",
        seed: int = 0,
        ignore: Iterable[str | type[nn.Module]] = (),
        **options: Any,
    ) -> None:
        self._data, self._likelihood, self._seed = data, likelihood, seed
        self._statistics: dict[str, list[Tensor]] = {}
        self._unread = dict.fromkeys(_without_curvature(unwrap(model)), _UNREAD)
        if not isinstance(ignore, (str, type)):
            ignore = [*ignore, *self._unread]
        super().__init__(model, optimizer, example_inputs, ignore=ignore, **options)

    @property
    def frozen(self) -> dict[str, str]:
        """Layers with neurons that cannot go, by name, and why."""
        return {name: self._unread.get(name, reason) for name, reason in super().frozen.items()}

    def _attach(self) -> None:
        """Leave the optimizer alone: nothing is read from its steps."""

    @staticmethod
    @abstractmethod
    def _statistic(data: LayerData) -> Sequence[Tensor]:
        """Return what is to be averaged over the data of a layer."""

    @abstractmethod
    def _importance(self, W: Tensor, *statistics: Tensor) -> Tensor:
        """Score the rows of W, ``[groups, d_out]``."""

    def _layer_scores(self) -> dict[str, Tensor]:
        names = [name for name in self._graph.hidden if is_layer(self._model.get_submodule(name))]
        self._statistics, _ = fisher_statistics(
            self._model, self._data, self._statistic, names, likelihood=self._likelihood, seed=self._seed
        )
        return {
            name: self._importance(weight_matrix(self._model.get_submodule(name)), *found).flatten()  # type: ignore[arg-type]
            for name, found in self._statistics.items()
        }


class SurgeonPruner(CurvaturePruner):
    """Change the remaining weights when neurons go, so that the loss rises less.

    ``copies`` are compensated by the same linear rule, each from its own weights. What the optimizer keeps of the
    remaining weights stays as it was.

    Args:
        damping: What is added to a factor before it is inverted, as a share of its mean eigenvalue.

    Raises:
        ValueError: if the damping is not positive, or the removed neurons are to be kept.
    """

    def __init__(self, *arguments: Any, damping: float = 1e-4, keep_removed: bool = False, **options: Any) -> None:
        if not damping > 0:
            raise ValueError(f"damping={damping!r} must be positive: a factor may have no inverse without it")
        if keep_removed:
            raise ValueError("keep_removed: a removal that changes the remaining weights cannot be undone")
        self._damping = damping
        super().__init__(*arguments, **options)

    @abstractmethod
    def _updated(self, W: Tensor, gone: Tensor, *statistics: Tensor) -> Tensor:
        """Return W with its remaining rows changed to make up for those that go."""

    def _inverse(self, M: Tensor) -> Tensor:
        inverse: Tensor = torch.linalg.inv(damped(M, self._damping))
        return inverse

    def _cut(self, removal: Removal) -> list[Change]:
        found, self._statistics = self._statistics, {}
        changes = super()._cut(removal)
        for name, kept in kept_without(self._channels, removal.gone).items():
            if name in found and len(kept.outputs) < len(self._channels[name].outputs):
                for model in (self._model, *self._copies):
                    changes += self._compensation(model.get_submodule(name), kept, found[name])  # type: ignore[arg-type]
        return changes

    def _compensation(self, layer: Layer, kept: Kept, statistics: list[Tensor]) -> list[Change]:
        """Prepare to change a layer's remaining weights, once it has been cut."""
        W = weight_matrix(layer)
        gone = torch.ones(len(layer.weight), dtype=torch.bool)
        gone[kept.outputs] = False
        updated = self._updated(W, gone.reshape(len(W), -1).to(W.device), *statistics)
        whole = {"weight": updated[..., : layer.weight[0].numel()].reshape(layer.weight.shape)}
        if layer.bias is not None:
            whole["bias"] = updated[..., -1].flatten()
        selections = module_cut(layer, kept).tensors
        return [_writing(getattr(layer, name), select(t, selections[name])) for name, t in whole.items()]

    def load_state_dict(self, state_dict: Any) -> None:
        """Cut the fresh dense model as :meth:`kfac_flat.NeuronPruner.load_state_dict` does; then load its weights."""
        self._statistics = {}
        super().load_state_dict(state_dict)


class ChannelOBDPruner(CurvaturePruner):
    """C-OBD: the neurons whose weights matter least, each taken by itself.

    Reading the diagonal takes a layer's weight times the examples of a batch in memory: give ``data`` in small batches
    for wide layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(16, 4)]
        >>> pruner = ChannelOBDPruner(model, optimizer, data[0], data, target=0.5, start=1, events=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    _statistic = staticmethod(fisher_diagonal)

    def _importance(self, W: Tensor, *statistics: Tensor) -> Tensor:
        return channel_obd_importance(W, *statistics)


class KronOBDPruner(CurvaturePruner):
    """Kron-OBD: the neurons whose removal raises the loss least.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(16, 4)]
        >>> pruner = KronOBDPruner(model, optimizer, data[0], data, target=0.5, start=1, events=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    _statistic = staticmethod(kronecker_factors)

    def _importance(self, W: Tensor, *statistics: Tensor) -> Tensor:
        return kron_obd_importance(W, *statistics)


class ChannelOBSPruner(SurgeonPruner):
    """C-OBS: the neurons whose weights matter least when others compensate for each of them by itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(16, 4)]
        >>> pruner = ChannelOBSPruner(model, optimizer, data[0], data, target=0.5, start=1, events=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    _statistic = staticmethod(kronecker_factors)

    def _importance(self, W: Tensor, *statistics: Tensor) -> Tensor:
        return channel_obs_importance(W, *map(self._inverse, statistics))

    def _updated(self, W: Tensor, gone: Tensor, *statistics: Tensor) -> Tensor:
        A_inverse, G_inverse = map(self._inverse, statistics)
        return channel_obs_update(W, A_inverse, G_inverse, gone)


class KronOBSPruner(SurgeonPruner):
    """Kron-OBS: the neurons whose removal raises the loss least when the others compensate for it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> optimizer, data = torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(16, 4)]
        >>> pruner = KronOBSPruner(model, optimizer, data[0], data, target=0.5, start=1, events=1)
        >>> pruner.step().widths_after
        {'0': 4, '2': 3}
    """

    _statistic = staticmethod(kronecker_factors)

    def _importance(self, W: Tensor, *statistics: Tensor) -> Tensor:
        A, G = statistics
        return kron_obs_importance(W, A, self._inverse(G))

    def _updated(self, W: Tensor, gone: Tensor, *statistics: Tensor) -> Tensor:
        return kron_obs_update(W, damped(statistics[1], self._damping), gone)


def _without_curvature(model: nn.Module) -> list[str]:
    """Names of layers with neurons whose curvature is not read, or that share a weight, whose update is not known."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(p, []).append(name)
    shared = {name for names in holders.values() if len(names) > 1 for name in names}
    producers = {name: module for name, module in model.named_modules() if is_producer(module)}
    return [name for name, module in producers.items() if name in shared or not is_layer(module)]


def _writing(parameter: nn.Parameter, values: Tensor) -> Change:
    """Write values into a parameter that has just been cut; the cut taken back, it has its own again."""

    def write() -> None:
        with torch.no_grad():
            parameter.copy_(values)

    return Change(write, lambda: None)
