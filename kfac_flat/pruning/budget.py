"""How many neurons go now, and which: cheapest first, as far as the floors allow."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
class Groups:
    """Neurons that go together, as far as counting is concerned.

    Attributes:
        ids: The groups that can go, ``[groups]``, ascending.
        members: For each of them, how many neurons of which layer, by name.
        widths: Neurons of each layer, by name.
        alike: Places of the groups that have as many neurons of the same layers.
    """

    ids: Tensor
    members: list[dict[str, int]]
    widths: dict[str, int]
    alike: list[list[int]]

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Groups:
        """Read them off the group of each layer's output channels."""
        members: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for name, groups in outputs.items():
            ids, counts = torch.unique(groups[groups != FIXED], return_counts=True)
            for i, count in zip(ids.tolist(), counts.tolist(), strict=True):
                members[i][name] = count
        ids = sorted(members)
        alike: defaultdict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
        for g, i in enumerate(ids):
            alike[tuple(members[i].items())].append(g)
        widths = {name: len(groups) for name, groups in outputs.items()}
        return cls(torch.tensor(ids, dtype=torch.long), [members[i] for i in ids], widths, list(alike.values()))

    @property
    def neurons(self) -> list[int]:
        """Neurons of each group."""
        return [sum(members.values()) for members in self.members]

    def normalised(self, scores: Sequence[float], how: str) -> list[float]:
        """Divide scores by a norm of those of like groups; infinite ones stay, and count for nothing."""
        result = torch.tensor(scores, dtype=torch.float64)
        for groups in self.alike:
            own = result[groups]
            known = own[own.isfinite()]
            if len(known):
                result[groups] = own / _NORMS[how](known).clamp(min=torch.finfo(own.dtype).tiny)
        values: list[float] = result.tolist()
        return values

    def order(
        self,
        scores: Sequence[float],
        costs: Sequence[float],
        *,
        floors: Mapping[str, int],
        round_to: int = 1,
        layerwise: bool = False,
    ) -> list[list[int]]:
        """Put what can go in the order in which it should, smallest score per cost first, ties by index.

        Args:
            scores: Effect of removing each group; an infinite one stays.
            costs: What each group costs while it is there.
            floors: Neurons that each layer keeps at least, by name.
            round_to: Layers end at multiples of this, or as they are.
            layerwise: Whether layers lose alike; scores decide within each only.

        Returns:
            Places of the groups, in chunks that can only go at once.
        """
        left, order = dict(self.widths), []
        for chunk in self._chunks(scores, costs, round_to, layerwise):
            members = self.members[chunk[0]]
            after = {name: left[name] - number * len(chunk) for name, number in members.items()}
            if all(width >= floors[name] and width % round_to == 0 for name, width in after.items()):
                left.update(after)
                order.append(chunk)
        return order

    def fewest(self, order: Sequence[Sequence[int]], enough: Callable[[Tensor], bool]) -> Tensor:
        """Return the ids of as many chunks, from the first, as are enough; all where that is not enough."""
        count = bisect.bisect_left(range(1, len(order)), True, key=lambda n: enough(self.first(order, n))) + 1
        return self.first(order, count)

    def first(self, order: Sequence[Sequence[int]], count: int) -> Tensor:
        """Return the ids of the groups in the first so many chunks, ascending."""
        return self.ids[sorted(g for chunk in order[:count] for g in chunk)]

    def cheapest(self, scores: Sequence[float], count: int, *, min_neurons: int, round_to: int) -> Tensor:
        """Choose groups to remove, smallest score per neuron first, until ``count`` neurons are gone.

        Returns:
            The chosen ids, ascending; fewer than asked for where the floors leave no more.
        """
        neurons = self.neurons
        order = self.order(scores, neurons, floors=dict.fromkeys(self.widths, min_neurons), round_to=round_to)
        removed = 0
        for n, chunk in enumerate(order):
            if removed >= count:
                return self.first(order, n)
            removed += sum(neurons[g] for g in chunk)
        return self.first(order, len(order))

    def _chunks(
        self, scores: Sequence[float], costs: Sequence[float], round_to: int, layerwise: bool
    ) -> list[list[int]]:
        """What can only go at once, cheapest first: single groups, or as many as ``round_to`` asks for."""
        chunks: list[tuple[float, list[int]]] = []
        for alike in self.alike:
            groups = sorted((g for g in alike if scores[g] < math.inf), key=lambda g: (scores[g] / costs[g], g))
            first, size = self._chunk_sizes(self.members[alike[0]], round_to)
            for begin, end in pairwise([0, *range(first, len(groups) + 1, size)]):
                chunk = groups[begin:end]
                score = sum(scores[g] for g in chunk) / sum(costs[g] for g in chunk)
                chunks.append((end / len(groups) if layerwise else score, chunk))
        return [chunk for _, chunk in sorted(chunks)]

    def _chunk_sizes(self, members: Mapping[str, int], round_to: int) -> tuple[int, int]:
        """Return how many groups to remove first, and then each time, for widths to be multiples of ``round_to``."""
        size = math.lcm(*(round_to // math.gcd(round_to, number) for number in members.values()))
        aligned = (
            f
            for f in range(1, size + 1)
            if all((self.widths[n] - f * number) % round_to == 0 for n, number in members.items())
        )
        return next(aligned, size), size
