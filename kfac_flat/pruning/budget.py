"""How much goes, when, and how neurons compete: what a user asks of a pruner, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from kfac_flat.pruning.groups import NORMS
from kfac_flat.pruning.report import Size

BUDGETS = ("neurons", "parameters", "macs", "latency")

# (1 - 0.9) * 10 is a little more than 1, and 100 * (1 - 0.07) a little less than 93.
ROUNDING = 1e-9

# Of the neurons that an even cut to the target would leave a layer, what it keeps unless told otherwise: by evidence.
EVEN_SHARE = 0.7


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
            ("normalize", self.normalize, (None, *NORMS)),
            ("per", self.per, ("neuron", "parameter", "mac", "group")),
        ):
            if value not in known:
                raise ValueError(f"{what}={value!r} must be one of {', '.join(map(repr, known))}")


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
    max_share: float | None
    max_step: float
    round_to: int
    ranking: Ranking
    rounding: Callable[[float], int] = math.ceil  # of the floors that nobody asked for

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
        shares = {"max_share": 1.0 if self.max_share is None else self.max_share, "max_step": self.max_step}
        for name, share in shares.items():
            if not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ValueError(f"{name}={share!r} must lie in (0, 1]: it is a share of each layer's neurons")
        if self.neurons_per_event is not None and self.budget != "neurons":
            raise ValueError(f"neurons_per_event is a number of neurons, but budget={self.budget!r}")

    @property
    def times(self) -> bool:
        """Whether the budget is measured with a clock."""
        return self.budget == "latency"

    def amount(self, size: Size) -> float:
        """What a size is in terms of the budget."""
        return float(getattr(size, self.budget))

    def events(self, neurons: int, events: int) -> int:
        """Return how many removals there are, for a model of so many neurons."""
        if self.neurons_per_event is None:
            return events
        return max(1, math.ceil(round(self.target * neurons) / self.neurons_per_event))

    def goal(self, original: float, event: int, share: float) -> float:
        """Return what is to be left of the budget after an event, with which this share of the target is due."""
        if self.budget != "neurons":
            return original * (1 - self.target * share + ROUNDING)
        if self.neurons_per_event is None:
            return original - round(self.target * share * original)
        return original - min(event * self.neurons_per_event, round(self.target * original))

    def reached(self, progress: float) -> bool:
        """Tell whether so large a share of the budget gone is enough."""
        return progress >= self.target - ROUNDING

    def why_finished(self, progress: float) -> str:
        """Say why nothing more goes."""
        if self.reached(progress):
            return "finished: the target has been reached"
        return "finished: all removals have been made"

    def relaxed(self) -> Iterator[Options]:
        """Yield these, then with lower floors and with none, as far as nobody asked for them."""
        yield self
        if self.max_share is None:
            yield replace(self, rounding=math.floor)
            yield replace(self, max_share=1.0)

    def floors(self, widths: Mapping[str, int], original: Mapping[str, int]) -> dict[str, int]:
        """Return how many neurons each layer keeps at least in the next removal, by name."""
        return {
            name: max(
                self.min_neurons,
                self._kept_at_least(original[name]),
                math.ceil((1 - self.max_step) * width - ROUNDING),
            )
            for name, width in widths.items()
        }

    def _kept_at_least(self, width: int) -> int:
        """Return how many of a layer's original neurons stay in the whole run."""
        if self.max_share is None:
            return self.rounding(round(EVEN_SHARE * (1 - self.target) * width, 9))
        return math.ceil((1 - self.max_share) * width - ROUNDING)

    def __str__(self) -> str:
        floors = f"min_neurons={self.min_neurons}, max_share={self.max_share}, max_step={self.max_step}"
        return floors if self.round_to == 1 else f"{floors}, round_to={self.round_to}"
