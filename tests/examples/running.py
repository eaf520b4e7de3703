"""Running the examples as a user does, and watching what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer

import kfac_flat

ROOT = Path(__file__).parents[2]


def printed_by(example: str, *arguments: Any) -> str:
    """Run an example in a process of its own; one thread, so that a busy machine does not slow it down."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", f"examples.{example}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def said_at_exit(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str], code: int, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that ends at once with this code; returns what it says."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == code
    return "".join(capsys.readouterr())


def penalties(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the mu of every FlatKFAC that an example makes from now on."""
    seen: list[float] = []

    class Watched(kfac_flat.FlatKFAC):
        def __init__(self, optimizer: Optimizer, model: nn.Module, *, mu: float) -> None:
            seen.append(mu)
            super().__init__(optimizer, model, mu=mu)

    monkeypatch.setattr(example, "FlatKFAC", Watched)
    return seen
