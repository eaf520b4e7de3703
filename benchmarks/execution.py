"""How networks are run: what changes the time that training takes, and its result no more than rounding does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

AMP = {"bf16": torch.bfloat16}  # types of which products are computed, by the name that options and records have


@dataclass(frozen=True)
class Execution:
    """How training runs a network.

    Attributes:
        amp: Name of the type in :data:`AMP` to which autocast goes; None for none.
        backend: Backend of torch.compile; None where nothing is compiled.
        channels_last: Whether weights of convolutions lie in memory as images do whose channels come last.

    Example:
        >>> with Execution(amp="bf16").autocast(torch.device("cpu")):
        ...     nn.Linear(2, 2)(torch.ones(1, 2)).dtype
        torch.bfloat16
    """

    amp: str | None = None
    backend: str | None = None
    channels_last: bool = False

    @property
    def eager(self) -> Execution:
        """The same with nothing compiled."""
        return replace(self, backend=None)

    def placed(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to its device, laid out as it should be there."""
        return model.to(device, memory_format=torch.channels_last if self.channels_last else torch.preserve_format)

    def compiled(self, model: nn.Module) -> nn.Module:
        """Return what is called in place of the model, with which it shares everything."""
        return model if self.backend is None else cast(nn.Module, torch.compile(model, backend=self.backend))

    def forget_compiled(self) -> None:
        """Let go of what has been compiled: torch keeps a few shapes of a network, and compiles no more of them."""
        if self.backend is not None:
            torch.compiler.reset()

    def autocast(self, device: torch.device) -> torch.autocast:
        """Make the context of forward passes."""
        return torch.autocast(device.type, AMP.get(self.amp or ""), enabled=self.amp is not None)


PLAIN = Execution()
