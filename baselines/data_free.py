"""Data-free pruning: of two neurons almost alike, one does the work of both [Srinivas & Babu, arXiv 1507.06149]."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kfac_flat import CutError, NeuronPruner, PruneReport
from kfac_flat.changes import Change
from kfac_flat.distributed import Agreement
from kfac_flat.nested import largest_difference
from kfac_flat.pruning import layers
from kfac_flat.pruning.graph import kept_without
from kfac_flat.structure import Kept, structural_copy

# Neurons of a layer go in the order of their merges, so that scores rise by more than rounding could take away again.
_LEAST, _STEP = 1e-200, 1 + 1e-9


@dataclass(frozen=True)
class Merge:
    """A neuron that goes, and the one that takes over what it is read with.

    Attributes:
        removed: Its position in the layer.
        into: The position of the other one.
        saliency: Bound on the mean squared change of the next layer's inputs, for an input of length one.
    """

    removed: int
    into: int
    saliency: float


def merges(incoming: Tensor, outgoing: Tensor) -> list[Merge]:
    """Return the order in which the neurons of a layer go into one another until a single one is left.

    With w_i a neuron's incoming weights and c_i its outgoing ones, each time the pair with the smallest
    ``s_ij = mean(c_j^2) ||w_i - w_j||^2`` loses j, and c_j is added to c_i [section 3]. Distances between neurons never
    change, so that after the first O(n^2) a merge costs O(n), where few others have the lost one as their nearest.

    Args:
        incoming: Weights with the bias appended, ``[n, d]``.
        outgoing: Weights by which the next layer reads each neuron, ``[n, outputs]``.

    Returns:
        ``n - 1`` merges.

    Example:
        >>> merges(torch.tensor([[1.0], [0.0], [3.0]]), torch.tensor([[2.0], [1.0], [1.0]]))
        [Merge(removed=1, into=0, saliency=1.0), Merge(removed=2, into=0, saliency=4.0)]
    """
    # Exactly nought for exact duplicates.
    squares = torch.cdist(incoming, incoming, compute_mode="donot_use_mm_for_euclid_dist").square()
    squares.fill_diagonal_(math.inf)
    nearest, partner = squares.min(0)
    read, found = outgoing.clone(), []
    strength, alive = read.square().mean(1), torch.ones(len(read), dtype=torch.bool, device=read.device)
    for _ in range(len(read) - 1):
        saliencies = torch.where(alive, strength * nearest, math.inf)
        j = int(saliencies.argmin())
        i = int(partner[j])
        found.append(Merge(j, i, float(saliencies[j])))
        read[i] += read[j]
        strength[i] = read[i].square().mean()
        alive[j] = False
        squares[j] = math.inf
        bereft = alive & (partner == j)
        nearest[bereft], partner[bereft] = squares[:, bereft].min(0)
    return found


def cut_off(saliencies: Tensor) -> float:
    """Return the saliency up to which neurons can go, told from the saliencies alone: their mode.

    Those of neurons that matter little gather around a value, and those of the others form a long tail above it
    [section 4]. The mode is the middle of the fullest bar of a histogram, the first of equals; how wide bars are is not
    said there, here it is 2 (interquartile range) / n^(1/3), which the tail does not widen [Freedman & Diaconis 1981].

    Args:
        saliencies: Of all merges of a layer, ``[n - 1]``.

    Example:
        >>> cut_off(torch.tensor([0.0, 3.0, 5.0, 5.5, 5.5, 6.0, 7.0, 900.0]))
        6.125
    """
    low, high = saliencies.quantile(torch.tensor([0.25, 0.75]).to(saliencies))
    width = 2 * (high - low) / len(saliencies) ** (1 / 3)
    if not width:
        return float(low)
    bars, heights = ((saliencies - saliencies.min()) / width).floor().unique(return_counts=True)
    return float(saliencies.min() + (bars[heights.argmax()] + 0.5) * width)


class DataFreePruner(NeuronPruner):
    """Merge the neurons of fully connected layers that are most alike, needing neither data nor training.

    A neuron's score is the saliency at which it goes into another one (``merges`` in this module), or that of those
    that go before it where that is more; all else is as in NeuronPruner. What it leaves changes: where neurons i and j
    become one, the layers that read them read i by the sum of both weights. Saliencies of different layers are bounds
    on changes in different places; ``normalize`` or ``ranking="layer"`` puts them on one scale.

    Behind an activation with f(ax) = a f(x) for a > 0, ReLU for one, two neurons do the same work already if one's
    incoming weights are a multiple of the other's. With ``homogeneous``, neurons are compared with incoming weights and
    bias scaled to length one and the outgoing weights by the inverse, which leaves the network's function as it is; of
    neurons i and j of lengths l_i and l_j, c_j l_j / l_i is added to c_i [section 3.3].

    Neurons of a Linear layer take part where nothing but element-wise functions lies between them and the Linear layers
    that read them; all others stay. No optimizer step is needed before a removal.

    Args:
        model: As for NeuronPruner, like all that follows.
        optimizer: Its state for what is left stays as it is.
        example_inputs: What the model is called with.
        cut_off: Whether neurons stay whose saliency lies above the mode of their layer's (``cut_off`` in this module),
            so that ``target`` is no more than a bound.
        homogeneous: Whether neurons are compared by the direction of their weights alone.
        options: Options of NeuronPruner; ``keep_removed`` is not among them, since a merge is not undone by putting
            the neuron back.

    Raises:
        ValueError: as NeuronPruner does, or if ``keep_removed`` is asked for, or ``homogeneous`` where the output on
            ``example_inputs`` changes when neurons are scaled and read by the inverse.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with torch.no_grad():
        ...     model[0].weight[5:], model[0].bias[5:] = model[0].weight[0], model[0].bias[0]
        >>> x = torch.randn(16, 4)
        >>> before = model(x).detach()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = DataFreePruner(model, optimizer, x, target=0.375, start=1, events=1)
        >>> pruner.step().widths_after
        {'0': 5, '2': 3}
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        cut_off: bool = False,
        homogeneous: bool = False,
        **options: Any,
    ) -> None:
        if options.pop("keep_removed", False):
            raise ValueError("neurons that have been merged cannot be put back: leave keep_removed=False")
        self._stops, self._homogeneous = cut_off, homogeneous
        super().__init__(model, optimizer, example_inputs, **options)
        if homogeneous:
            self._check_homogeneous(example_inputs)

    def _scores(self) -> list[float]:
        scores = torch.full((len(self._groups.ids),), math.inf, dtype=torch.float64)
        for name, readers in self._mergeable():
            sequence = merges(*self._weights(name, readers))
            saliencies = torch.tensor([merge.saliency for merge in sequence], dtype=torch.float64)
            highest = cut_off(saliencies) if self._stops else math.inf
            groups = torch.searchsorted(self._groups.ids, self._channels[name].outputs)
            score = _LEAST
            for merge in sequence:
                if merge.saliency > highest:
                    break
                score = max(merge.saliency, score * _STEP)
                scores[groups[merge.removed]] = score
        return scores.tolist()

    def _end(self, epoch: int, agreement: Agreement) -> tuple[PruneReport, list[Change]]:
        """Prepare what is to happen at the end of this epoch, and let those that stay take over from those that go."""
        report, changes = super()._end(epoch, agreement)
        lost = {name: torch.isin(self._left.kept[name][1], gone) for name, gone in report.removed.items()}
        if lost:
            kept = kept_without(
                self._channels, torch.cat([self._channels[n].outputs[gone] for n, gone in lost.items()])
            )
            for name, readers in self._mergeable():
                if name in lost:
                    changes += self._take_over(name, readers, lost[name], kept)
        return report, changes

    def _take_over(self, name: str, readers: list[str], lost: Tensor, kept: Mapping[str, Kept]) -> Iterator[Change]:
        """Add what the lost neurons of a layer are read by to what those are that they go into."""
        sequence = merges(*self._weights(name, readers))[: int(lost.sum())]
        if not lost[[merge.removed for merge in sequence]].all():
            raise CutError(f"the neurons of {name} would not go in the order in which they can be merged")
        heirs = torch.arange(len(lost))
        for merge in sequence:
            heirs[heirs == merge.removed] = merge.into
        for model in (self._model, *self._copies):
            lengths = self._lengths(_incoming(model, name))
            shares = lengths[lost] / lengths[heirs[lost]]
            for reader in readers:
                weight, columns = _linear(model, reader).weight, self._columns(name, reader)
                left = weight.detach()[:, columns[lost]] * shares.to(weight)
                inherited = torch.zeros_like(weight, requires_grad=False)
                inherited.index_add_(1, columns[heirs[lost]].to(weight.device), left)
                yield _adding(weight, inherited[kept[reader].outputs][:, kept[reader].inputs])

    def _mergeable(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the layers whose neurons can be merged, and the names of the layers that read them."""
        modules = {name: layers.part(self._model, name) for name in self._channels}
        alone = self._groups.ids[self._groups.neurons == 1]
        for name in self._graph.hidden:
            own = self._channels[name].outputs
            meets = [other for other, c in self._channels.items() if other != name and torch.isin(own, c.inputs).any()]
            readers = [other for other in meets if other in self._graph.consumers]
            if (
                isinstance(modules[name], nn.Linear)
                and readers
                and readers == meets  # whatever else has numbers of its own for each neuron
                and bool(torch.isin(own, alone).all())
                and all(isinstance(modules[reader], nn.Linear) for reader in readers)
                and all(self._reads_once(own, reader) for reader in readers)
            ):
                yield name, readers

    def _reads_once(self, neurons: Tensor, reader: str) -> bool:
        """Tell whether a layer reads each of these neurons by one column."""
        read = self._channels[reader].inputs
        return bool(torch.isin(neurons, read).all()) and int(torch.isin(read, neurons).sum()) == len(neurons)

    def _columns(self, name: str, reader: str) -> Tensor:
        """Which column of a reader reads each neuron of a layer, ``[n]``."""
        read = self._channels[reader].inputs
        order = read.argsort()
        return order[torch.searchsorted(read[order], self._channels[name].outputs)]

    def _weights(self, name: str, readers: list[str]) -> tuple[Tensor, Tensor]:
        """Incoming weights with the bias appended, ``[n, C_in + 1]``, and outgoing ones, ``[n, outputs]``; float64."""
        incoming = _incoming(self._model, name)
        read = torch.cat([_linear(self._model, reader).weight[:, self._columns(name, reader)] for reader in readers])
        lengths = self._lengths(incoming)[:, None]
        return incoming / lengths, read.detach().double().T.contiguous() * lengths

    def _lengths(self, incoming: Tensor) -> Tensor:
        """What neurons are divided by before they are compared, ``[n]``."""
        lengths = incoming.norm(dim=1) if self._homogeneous else incoming.new_ones(len(incoming))
        return torch.where(lengths > 0, lengths, 1)

    def _check_homogeneous(self, example_inputs: Any) -> None:
        """Scale neurons by powers of two, which is exact, and see whether the output stays the same."""
        before, after = (structural_copy(self._model, lambda t: t.detach().clone()).eval() for _ in range(2))
        for name, readers in self._mergeable():
            layer = _linear(after, name)
            factors = 4.0 ** (torch.arange(len(layer.weight)) % 3 - 1)
            layer.weight.mul_(factors.to(layer.weight)[:, None])
            if layer.bias is not None:
                layer.bias.mul_(factors.to(layer.bias))
            for reader in readers:
                weight, columns = _linear(after, reader).weight, self._columns(name, reader)
                weight[:, columns] /= factors.to(weight)
        if not largest_difference(*(_called(model, example_inputs) for model in (after, before))) < 1e-4:
            raise ValueError(
                "homogeneous=True asks for activations with f(ax) = a f(x) for a > 0, such as ReLU, but the output "
                "changes when neurons are scaled and read by the inverse: leave homogeneous=False"
            )

    def _why_less(self, scores: list[float]) -> str:
        staying = sum(score == math.inf for score in scores)
        return (
            f"fewer neurons went than were due: of {len(scores)} groups, {staying} cannot be merged, are the last of "
            f"their layer{' or lie above its cut-off' if self._stops else ''}; others are at their floor "
            f"({self._options})"
        )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return model.get_submodule(name)  # type: ignore[return-value]


def _incoming(model: nn.Module, name: str) -> Tensor:
    """A layer's weights with the bias appended, ``[n, C_in + 1]``; float64."""
    layer = _linear(model, name)
    weights = layer.weight if layer.bias is None else torch.cat([layer.weight, layer.bias[:, None]], 1)
    return weights.detach().double()


@torch.no_grad()
def _called(model: nn.Module, example_inputs: Any) -> Any:
    """What the model makes of a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    return model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))


def _adding(weight: Tensor, inherited: Tensor) -> Change:
    """Add to a weight once it has been cut; the cut's own way back leads past it."""

    @torch.no_grad()
    def add() -> None:
        weight.add_(inherited)

    return Change(add, lambda: None)
