"""How many neurons go now, and which: cheapest first, as far as the floors allow."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_flat.pruning.ids import FIXED

PACES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # Zhu & Gupta, arXiv 1710.01878: many neurons while there are many
}


@dataclass(frozen=True)
class Schedule:
    """When neurons are removed: ``events`` times, every ``every`` epochs, first at the end of epoch ``start``.

    Raises:
        ValueError: if a number is not a positive whole one, or the pace is unknown.
    """

    start: int
    every: int
    events: int
    pace: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "every", "events"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1")
        if self.pace not in PACES:
            raise ValueError(f"pace={self.pace!r} must be one of {', '.join(map(repr, PACES))}")

    def is_due(self, epoch: int) -> bool:
        """Tell whether neurons go at the end of this epoch, the first being 1."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def share(self, event: int) -> float:
        """Share of the target to be reached with this event, the first being 1."""
        return PACES[self.pace](min(1.0, event / self.events))


@dataclass(frozen=True)
class Ranking:
    """How the effects of removing different groups are compared.

    Attributes:
        scope: "global": all layers compete; "layer": each loses the same share of its groups.
        normalize: What scores are divided by before they are compared: None, or the "mean", "max" or "l2" norm of the
            scores in the same layers [l2: Molchanov et al., arXiv 1611.06440].
        per: What a score is counted per: the "neuron", "parameter" or "mac" that its removal saves, or the whole
            "group".

    Raises:
        ValueError: if one of them is unknown.
    """

    scope: str = "global"
    normalize: str | None = None
    per: str = "neuron"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("ranking", self.scope, ("global", "layer")),
            ("normalize", self.normalize, (None, *_NORMS)),
            ("per", self.per, ("neuron", "parameter", "mac", "group")),
        ):
            if value not in known:
                raise ValueError(f"{what}={value!r} must be one of {', '.join(map(repr, known))}")


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.max, "l2": Tensor.norm}


@dataclass(frozen=True)
class Order:
    """Groups in the order in which they should go, in chunks that can only go at once.

    Attributes:
        ids: The groups, ``[groups]``.
        ends: Where each chunk ends, ``[chunks]``.
    """

    ids: Tensor
    ends: Tensor

    def first(self, count: int) -> Tensor:
        """Return the groups in the first so many chunks, ascending."""
        return self.ids[: int(self.ends[count - 1]) if count else 0].sort().values

    def fewest(self, enough: Callable[[Tensor], bool]) -> Tensor:
        """Return the groups of as many chunks, from the first, as are enough; all where that is not enough."""
        counts = range(len(self.ends))
        return self.first(bisect.bisect_left(counts, True, key=lambda count: enough(self.first(count))))


@dataclass(frozen=True)
class Kind:
    """Groups that have as many neurons of the same layers.

    Attributes:
        members: How many neurons of which layer, by name.
        groups: Places of the groups, ``[groups]``, ascending.
    """

    members: dict[str, int]
    groups: Tensor

    def chunk_sizes(self, widths: Mapping[str, int], round_to: int) -> tuple[int, int]:
        """Return how many groups to remove first, and then each time, for widths to be multiples of ``round_to``."""
        size = math.lcm(*(round_to // math.gcd(round_to, number) for number in self.members.values()))
        aligned = (
            first
            for first in range(1, size + 1)
            if all((widths[name] - first * number) % round_to == 0 for name, number in self.members.items())
        )
        return next(aligned, 0), size

    def allowed(self, widths: Mapping[str, int], floors: Mapping[str, int]) -> int:
        """Return how many groups can go before a layer is at its floor."""
        return max(0, min((widths[name] - floors[name]) // number for name, number in self.members.items()))


@dataclass(frozen=True)
class Groups:
    """Neurons that go together, as far as counting is concerned.

    Attributes:
        ids: The groups that can go, ``[groups]``, ascending.
        neurons: How many neurons each of them has, ``[groups]``.
        widths: Neurons of each layer, by name.
        kinds: The groups by what they consist of.
    """

    ids: Tensor
    neurons: Tensor
    widths: dict[str, int]
    kinds: list[Kind]

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Groups:
        """Read them off the group of each layer's output channels."""
        members: list[dict[str, int]] = [{}]
        kind_of = torch.zeros(max((int(g.max()) for g in outputs.values() if len(g)), default=FIXED) + 1).long()
        for name, groups in outputs.items():
            ids, counts = torch.unique(groups[groups != FIXED], return_counts=True)
            found, place = torch.unique(kind_of[ids] << 32 | counts, return_inverse=True)
            kind_of[ids] = len(members) + place
            members += [{**members[pair >> 32], name: pair & 0xFFFFFFFF} for pair in found.tolist()]
        ids = kind_of.nonzero().flatten()
        own = kind_of[ids]
        kinds = [Kind(members[k], (own == k).nonzero().flatten()) for k in torch.unique(own).tolist()]
        neurons = torch.tensor([sum(kind.values()) for kind in members])[own]
        return cls(ids, neurons, {name: len(groups) for name, groups in outputs.items()}, kinds)

    def normalised(self, scores: Tensor, how: str) -> Tensor:
        """Divide scores by a norm of those of like groups; infinite ones stay, and count for nothing."""
        result = scores.clone()
        for kind in self.kinds:
            own = scores[kind.groups]
            known = own[own.isfinite()]
            if len(known):
                result[kind.groups] = own / _NORMS[how](known).clamp(min=torch.finfo(own.dtype).tiny)
        return result

    def order(
        self,
        scores: Tensor,
        costs: Tensor,
        *,
        floors: Mapping[str, int],
        round_to: int = 1,
        layerwise: bool = False,
    ) -> Order:
        """Put what can go in the order in which it should, smallest score per cost first, ties by index.

        Args:
            scores: Effect of removing each group, ``[groups]``, float64; an infinite one stays.
            costs: What each group costs while it is there, ``[groups]``, float64.
            floors: Neurons that each layer keeps at least, by name.
            round_to: Layers end at multiples of this, or as they are.
            layerwise: Whether layers lose alike; scores decide within each only.
        """
        chunks = [
            self._chunks(kind, scores, costs, kind.allowed(self.widths, floors), round_to, layerwise)
            for kind in self.kinds
        ]
        if not chunks:
            return Order(self.ids, self.ids)
        groups, sizes, values = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        kinds = torch.arange(len(chunks)).repeat_interleave(torch.tensor([len(own) for _, own, _ in chunks]))
        starts = sizes.cumsum(0) - sizes
        by_index = groups[starts].argsort()
        order = by_index[values[by_index].argsort(stable=True)]
        order = order[self._affordable(sizes[order].tolist(), kinds[order].tolist(), floors)]
        sizes, starts = sizes[order], starts[order]
        ends = sizes.cumsum(0)
        places = torch.arange(int(sizes.sum())) + (starts - ends + sizes).repeat_interleave(sizes)
        return Order(self.ids[groups[places]], ends)

    def _chunks(
        self, kind: Kind, scores: Tensor, costs: Tensor, allowed: int, round_to: int, layerwise: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What of one kind can only go at once: its groups in order, the sizes of the chunks, and what these go by."""
        ratios = scores[kind.groups] / costs[kind.groups]
        scored = int(ratios.isfinite().sum())
        first, size = kind.chunk_sizes(self.widths, round_to)
        allowed = min(scored, allowed) if first else -1  # no number of groups will do
        sizes = torch.tensor([first] * (allowed >= first) + [size] * max(0, (allowed - first) // size)).long()
        groups = kind.groups[ratios.argsort(stable=True)][: int(sizes.sum())]
        if layerwise:
            return groups, sizes, sizes.cumsum(0).double() / len(kind.groups)
        chunk = torch.arange(len(sizes)).repeat_interleave(sizes)
        score, cost = (torch.zeros(len(sizes)).double().index_add(0, chunk, of[groups]) for of in (scores, costs))
        return groups, sizes, score / cost

    def _affordable(self, sizes: list[int], kinds: list[int], floors: Mapping[str, int]) -> Tensor:
        """Tell of chunks in order which can go; only layers of several kinds need to be watched."""
        times = Counter(name for kind in self.kinds for name in kind.members)
        watched = {k: kind for k, kind in enumerate(self.kinds) if any(times[name] > 1 for name in kind.members)}
        left = dict(self.widths)
        can_go = torch.ones(len(kinds), dtype=torch.bool)
        for i, (size, k) in enumerate(zip(sizes, kinds, strict=True)):
            if k not in watched:
                continue
            if watched[k].allowed(left, floors) < size:
                can_go[i] = False
                continue
            for name, number in watched[k].members.items():
                left[name] -= number * size
        return can_go

    def cheapest(self, scores: Sequence[float], count: int, *, min_neurons: int, round_to: int) -> Tensor:
        """Choose groups to remove, smallest score per neuron first, until ``count`` neurons are gone.

        Returns:
            The chosen ids, ascending; fewer than asked for where the floors leave no more.
        """
        floors = dict.fromkeys(self.widths, min_neurons)
        order = self.order(
            torch.tensor(scores, dtype=torch.float64), self.neurons.double(), floors=floors, round_to=round_to
        )
        return order.fewest(lambda gone: self.neurons_of(gone) >= count)

    def neurons_of(self, ids: Tensor) -> int:
        """Neurons in these groups."""
        return int(self.neurons[torch.searchsorted(self.ids, ids)].sum())
