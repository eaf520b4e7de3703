"""What a pruning step did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Size of a model: hidden neurons, parameters, multiply-accumulates of one example in eval mode."""

    neurons: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class PruneReport:
    """One call of :meth:`NeuronPruner.step` or :meth:`NeuronPruner.plan`.

    Attributes:
        epoch: Number of ``step()`` calls so far, this one included.
        removed: Channels that went, by layer: positions in the ORIGINAL layer, ascending.
        widths_before: Output channels of each layer before, by name.
        widths_after: The same afterwards.
        before: Size of the model before.
        after: Its size afterwards.
        sparsity: Removed neurons / original neurons, afterwards.
        reason: Why nothing went, or less than was due; empty otherwise.
    """

    epoch: int
    widths_before: dict[str, int]
    widths_after: dict[str, int]
    before: Size
    after: Size
    sparsity: float
    removed: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""

    def __bool__(self) -> bool:
        """Tell whether anything went."""
        return bool(self.removed)

    def __str__(self) -> str:
        head = f"epoch {self.epoch}: {self.sparsity:.1%} of the neurons removed"
        if not self.removed:
            return f"{head}; nothing went: {self.reason}"
        sizes = ", ".join(
            f"{getattr(self.before, what):,} -> {getattr(self.after, what):,} {what}"
            for what in ("neurons", "parameters", "macs")
        )
        changed = [n for n, width in self.widths_after.items() if width != self.widths_before[n]]
        widths = ", ".join(f"{n} {self.widths_before[n]} -> {self.widths_after[n]}" for n in changed)
        return "\n".join(filter(None, [head, f"  {sizes}", f"  {widths}", self.reason and f"  {self.reason}"]))
