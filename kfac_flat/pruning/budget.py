"""How many neurons go now, and which: cheapest first, as far as the floors allow."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kfac_flat.pruning.ids import FIXED


@dataclass(frozen=True)
class Schedule:
    """When neurons are removed: ``events`` times, every ``every`` epochs, first at the end of epoch ``start``.

    Raises:
        ValueError: if a number is not a positive whole one.
    """

    start: int
    every: int
    events: int

    def __post_init__(self) -> None:
        for name in ("start", "every", "events"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1")

    def is_due(self, epoch: int) -> bool:
        """Tell whether neurons go at the end of this epoch, the first being 1."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def share(self, event: int) -> float:
        """Share of the target to be reached with this event, the first being 1: equal steps."""
        return min(1.0, event / self.events)


@dataclass(frozen=True)
class Groups:
    """Neurons that go together, as far as counting is concerned.

    Attributes:
        ids: The groups that can go, ``[groups]``, ascending.
        members: For each of them, how many neurons of which layer, by name.
        widths: Neurons of each layer, by name.
    """

    ids: Tensor
    members: list[dict[str, int]]
    widths: dict[str, int]

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Groups:
        """Read them off the group of each layer's output channels."""
        members: defaultdict[int, dict[str, int]] = defaultdict(dict)
        for name, groups in outputs.items():
            ids, counts = torch.unique(groups[groups != FIXED], return_counts=True)
            for i, count in zip(ids.tolist(), counts.tolist(), strict=True):
                members[i][name] = count
        ids = sorted(members)
        return cls(
            torch.tensor(ids, dtype=torch.long), [members[i] for i in ids], {n: len(g) for n, g in outputs.items()}
        )

    def cheapest(self, scores: Sequence[float], count: int, *, min_neurons: int, round_to: int) -> Tensor:
        """Choose groups to remove, smallest score per neuron first, ties by index, until ``count`` neurons are gone.

        Args:
            scores: Effect of removing each group; an infinite one stays.
            count: Neurons to remove; the last group may exceed it.
            min_neurons: Neurons that every layer keeps.
            round_to: Layers end at multiples of this, or as they are.

        Returns:
            The chosen ids, ascending; fewer than asked for where the floors leave no more.
        """
        left = dict(self.widths)
        chosen: list[int] = []
        for chunk in self._chunks(scores, round_to):
            if count <= 0:
                break
            loss: defaultdict[str, int] = defaultdict(int)
            for g in chunk:
                for name, number in self.members[g].items():
                    loss[name] += number
            after = {name: left[name] - number for name, number in loss.items()}
            if all(width >= min_neurons and width % round_to == 0 for width in after.values()):
                left |= after
                chosen += chunk
                count -= sum(loss.values())
        return self.ids[sorted(chosen)]

    def _chunks(self, scores: Sequence[float], round_to: int) -> list[list[int]]:
        """What can only go at once, cheapest per neuron first: single groups, or as many as ``round_to`` asks for."""
        alike: defaultdict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
        for g, score in enumerate(scores):
            if score < math.inf:
                alike[tuple(sorted(self.members[g].items()))].append(g)
        chunks: list[tuple[float, list[int]]] = []
        for members, groups in alike.items():
            groups.sort(key=lambda g: (scores[g], g))
            first, size = self._chunk_sizes(members, round_to)
            for begin, end in pairwise([0, *range(first, len(groups) + 1, size)]):
                chunk = groups[begin:end]
                chunks.append((sum(scores[g] for g in chunk) / (len(chunk) * sum(n for _, n in members)), chunk))
        return [chunk for _, chunk in sorted(chunks)]

    def _chunk_sizes(self, members: tuple[tuple[str, int], ...], round_to: int) -> tuple[int, int]:
        """Return how many groups to remove first, and then each time, for widths to be multiples of ``round_to``."""
        size = math.lcm(*(round_to // math.gcd(round_to, number) for _, number in members))
        aligned = (f for f in range(1, size + 1) if all((self.widths[n] - f * k) % round_to == 0 for n, k in members))
        return next(aligned, size), size
