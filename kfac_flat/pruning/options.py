"""What a user asks of a pruner, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kfac_flat.pruning.budget import Ranking

BUDGETS = ("neurons", "parameters", "macs", "latency")


@dataclass(frozen=True)
class Options:
    """How much of what is to be removed, and how far it may go in each layer; see :class:`NeuronPruner`.

    Raises:
        ValueError: if one of them is out of range.
    """

    target: float
    budget: str
    neurons_per_event: int | None
    min_neurons: int
    max_share: float
    max_step: float
    round_to: int
    ranking: Ranking

    def __post_init__(self) -> None:
        if not isinstance(self.target, (int, float)) or not 0 < self.target < 1:
            raise ValueError(f"target={self.target!r} must lie in (0, 1): it is the share of the budget to remove")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget={self.budget!r} must be one of {', '.join(map(repr, BUDGETS))}")
        counts = {"min_neurons": self.min_neurons, "round_to": self.round_to}
        if self.neurons_per_event is not None:
            counts["neurons_per_event"] = self.neurons_per_event
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number, at least 1")
        for name, share in {"max_share": self.max_share, "max_step": self.max_step}.items():
            if not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ValueError(f"{name}={share!r} must lie in (0, 1]: it is a share of each layer's neurons")
        if self.neurons_per_event is not None and self.budget != "neurons":
            raise ValueError(f"neurons_per_event is a number of neurons, but budget={self.budget!r}")

    def events(self, neurons: int, events: int) -> int:
        """Return how many removals there are, for a model of so many neurons."""
        if self.neurons_per_event is None:
            return events
        return max(1, math.ceil(round(self.target * neurons) / self.neurons_per_event))

    def goal(self, original: float, event: int, share: float) -> float:
        """Return what is to be left of the budget after an event, with which this share of the target is due."""
        if self.budget != "neurons":
            return original * (1 - self.target * share + _ROUNDING)
        if self.neurons_per_event is None:
            return original - round(self.target * share * original)
        return original - min(event * self.neurons_per_event, round(self.target * original))

    def floors(self, widths: Mapping[str, int], original: Mapping[str, int]) -> dict[str, int]:
        """Return how many neurons each layer keeps at least in the next removal, by name."""
        return {
            name: max(
                self.min_neurons,
                math.ceil((1 - self.max_share) * original[name] - _ROUNDING),
                math.ceil((1 - self.max_step) * width - _ROUNDING),
            )
            for name, width in widths.items()
        }

    def __str__(self) -> str:
        return (
            f"min_neurons={self.min_neurons}, max_share={self.max_share}, max_step={self.max_step}, "
            f"round_to={self.round_to}"
        )


_ROUNDING = 1e-9  # (1 - 0.9) * 10 is a little more than 1, and 100 * (1 - 0.07) a little less than 93
