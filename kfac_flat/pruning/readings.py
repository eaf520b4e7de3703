"""At which optimizer steps the effect of removing neurons is read: enough of an epoch's, spread evenly."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Readings:
    """Chooses among the optimizer's steps.

    Reading goes through weights and gradients once. Of a small network, whose whole step takes not much longer, that is
    a large part, and a mean over some of the steps ranks neurons nearly as that over all of them does.

    Attributes:
        per_epoch: How many steps are chosen in an epoch, if there are as many, and fewer than twice as many; somewhat
            more in the first epoch, in which the number of steps turns out. None for all.
        before: Steps of the epoch before, 0 if there was none.
        seen: Steps of this epoch so far.

    Raises:
        ValueError: if ``per_epoch`` is not a positive whole number.

    Example:
        >>> readings = Readings(per_epoch=2)
        >>> [readings.next() for _ in range(10)]
        [True, True, True, True, True, False, True, False, True, False]
        >>> readings = readings.ended()
        >>> [readings.next() for _ in range(10)]
        [True, False, False, False, False, True, False, False, False, False]
    """

    per_epoch: int | None
    before: int = 0
    seen: int = 0

    def __post_init__(self) -> None:
        n = self.per_epoch
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise ValueError(f"readings={n!r} must be a whole number, at least 1, or None for every step")

    def next(self) -> bool:
        """Tell whether the step that comes now is chosen."""
        steps = self.before or self.seen
        apart = 1 if self.per_epoch is None else max(1, steps // self.per_epoch)
        self.seen += 1
        return (self.seen - 1) % apart == 0

    def ended(self) -> Readings:
        """Return what goes on when the epoch has ended."""
        return replace(self, before=self.seen, seen=0)
