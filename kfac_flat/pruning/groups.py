"""Groups of neurons, as far as counting is concerned: in which order they go, cheapest first, and how many do."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_flat.pruning.ids import FIXED

# What scores can be divided by.
NORMS: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.max, "l2": Tensor.norm}


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
        if not enough(self.first(len(counts))):
            return self.first(len(counts))
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

    def turns(self, groups: int, widths: Mapping[str, int], floors: Mapping[str, int], round_to: int) -> Tensor:
        """Return how many of so many groups go in each turn if they are the only ones to go, ``[turns]``."""
        first = self.fewest(widths, floors, round_to)
        then = math.lcm(*(round_to // math.gcd(round_to, number) for number in self.members.values()))
        most = min(groups, *((widths[name] - floors[name]) // number for name, number in self.members.items()))
        if not 0 < first <= most:
            return torch.zeros(0).long()
        turns = torch.full(((most - first) // then + 1,), then)
        turns[0] = first
        return turns

    def fewest(self, widths: Mapping[str, int], floors: Mapping[str, int], round_to: int) -> int:
        """Return how many groups have to go at once for widths to be multiples of ``round_to``; 0 if none can."""
        for count in range(1, round_to + 1):
            if all(
                (width := widths[name] - count * number) >= floors[name] and width % round_to == 0
                for name, number in self.members.items()
            ):
                return count
        return 0


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
                result[kind.groups] = own / NORMS[how](known).clamp(min=torch.finfo(own.dtype).tiny)
        return result

    def order(
        self,
        scores: Tensor,
        costs: Tensor,
        *,
        floors: Mapping[str, int],
        round_to: int = 1,
        alike: Groups | None = None,
    ) -> Order:
        """Put what can go in the order in which it should, smallest score per cost first, ties by index.

        Kinds take turns, in the order of what would go if there were no others, and each time lose the fewest of their
        cheapest groups that may go at once.

        Args:
            scores: Effect of removing each group, ``[groups]``, float64; an infinite one stays.
            costs: What each group costs while it is there, ``[groups]``, float64; one that costs nothing stays.
            floors: Neurons that each layer keeps at least, by name.
            round_to: Layers end at multiples of this, or as they are.
            alike: Where each layer is to lose the same share: of these groups, those before any went. Scores then
                decide within each layer only.
        """
        if not self.kinds:
            return Order(self.ids, self.ids)
        ratios = scores / costs
        queues = [kind.groups[ratios[kind.groups].argsort(stable=True)] for kind in self.kinds]
        queues = [queue[: int(ratios[queue].isfinite().sum())] for queue in queues]
        turns = [kind.turns(len(q), self.widths, floors, round_to) for kind, q in zip(self.kinds, queues, strict=True)]
        sizes = torch.cat(turns)
        groups = torch.cat([queue[: int(own.sum())] for queue, own in zip(queues, turns, strict=True)])
        if alike is None:
            turn = torch.arange(len(sizes)).repeat_interleave(sizes)
            score, cost = (torch.zeros(len(sizes)).double().index_add(0, turn, of[groups]) for of in (scores, costs))
            values = score / cost
        else:
            values = self._shares(turns, alike)
        by_index = groups[sizes.cumsum(0) - sizes].argsort()
        order = by_index[values[by_index].argsort(stable=True)]
        kinds = torch.arange(len(turns)).repeat_interleave(torch.tensor([len(own) for own in turns]))[order]
        sizes = sizes[kinds.argsort(stable=True).argsort()]  # a kind's first turn is its first, whatever rounding did
        return self._taken(queues, kinds, self._affordable(kinds, sizes, queues, floors, round_to))

    def _shares(self, turns: list[Tensor], whole: Groups) -> Tensor:
        """Share of its kind's groups in the whole that is gone after each turn, ``[turns]``."""
        counts = {frozenset(kind.members.items()): len(kind.groups) for kind in whole.kinds}
        before = [counts[frozenset(kind.members.items())] for kind in self.kinds]
        left = (len(kind.groups) - own.cumsum(0) for kind, own in zip(self.kinds, turns, strict=True))
        return torch.cat([1 - own.double() / count for own, count in zip(left, before, strict=True)])

    def _affordable(
        self, kinds: Tensor, sizes: Tensor, queues: list[Tensor], floors: Mapping[str, int], round_to: int
    ) -> Tensor:
        """Return how many groups can go in each turn; only kinds that share a layer need to be watched."""
        times = Counter(name for kind in self.kinds for name in kind.members)
        watched = {k: kind for k, kind in enumerate(self.kinds) if any(times[name] > 1 for name in kind.members)}
        if not watched:
            return sizes
        left, waiting, result = dict(self.widths), [len(queue) for queue in queues], sizes.tolist()
        for turn, k in enumerate(kinds.tolist()):
            if k in watched:
                count = watched[k].fewest(left, floors, round_to)
                result[turn] = count = count if count <= waiting[k] else 0
                waiting[k] -= count
                for name, number in watched[k].members.items():
                    left[name] -= number * count
        return torch.tensor(result).long()

    def _taken(self, queues: list[Tensor], kinds: Tensor, sizes: Tensor) -> Order:
        """Let so many groups go in each turn, the first ones in the queue of the kind whose turn it is."""
        numbers = torch.zeros(len(queues)).long().index_add(0, kinds, sizes).tolist()
        places = torch.empty(int(sizes.sum())).long()
        turns = kinds.repeat_interleave(sizes).argsort(stable=True)
        places[turns] = torch.cat([queue[:number] for queue, number in zip(queues, numbers, strict=True)])
        return Order(self.ids[places], sizes[sizes > 0].cumsum(0))

    def about_half(self, generator: torch.Generator) -> Tensor:
        """Draw about half of the groups of each kind, ascending ids, such that every layer is cut that can be.

        An odd number of each goes, so that code notices that asks whether a width is even, or a multiple of what is;
        and numbers vary, so that layers of one width differ afterwards.
        """
        gone = []
        for kind in self.kinds:
            count = len(kind.groups)
            drawn = torch.randperm(count, generator=generator)
            about = count // 2 + int(torch.randint(-(count // 8), count // 8 + 1, (), generator=generator))
            gone.append(kind.groups[drawn[: min((max(1, about) - 1) | 1, count - 1)]])
        return self.ids[torch.cat([torch.zeros(0).long(), *gone])].sort().values

    def neurons_of(self, ids: Tensor) -> int:
        """Neurons in these groups."""
        return int(self.neurons[torch.searchsorted(self.ids, ids)].sum())
