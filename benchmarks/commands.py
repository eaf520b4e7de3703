"""Command lines of the benchmarks: the options that several have, what was given, and how a command begins."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.digits import whole

SHARED: dict[str, dict[str, Any]] = {
    "--seeds": {"nargs": "+", "type": int, "metavar": "SEED", "help": "repetitions"},
    "--epochs": {"type": whole(1), "help": "of training; each task has its own unless given"},
    "--data-root": {"type": Path, "help": "folder of the data, as torchvision reads it"},
    "--device": {"default": "cpu", "help": "torch device to run on"},
    "--threads": {"type": whole(1), "default": 1, "help": "CPU threads"},
    "--out": {"type": Path, "help": "folder for results"},
}


class Parser(argparse.ArgumentParser):
    """Reads the options of a benchmark.

    Args:
        benchmark: Its name.
        description: What it does.

    Example:
        >>> parser = Parser("accuracy", "Compare methods.")
        >>> parser.add_shared("--data-root")
        >>> parser.add_shared("--seeds", default=[0, 1])
        >>> parser.read(["--data-root", "/home/me/data", "--seeds", "7"]).command
        'python -m benchmarks.accuracy --data-root DATA --seeds 7'
    """

    def __init__(self, benchmark: str, description: str) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{benchmark}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_shared(self, name: str, **own: Any) -> None:
        """Add an option as it is in :data:`SHARED`, but for what is given."""
        self.add_argument(name, **{**SHARED[name], **own})

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Read the options, and add the whole command as ``command``."""
        options = self.parse_args(arguments)
        given = sys.argv[1:] if arguments is None else arguments
        options.command = f"{self.prog} {shlex.join(without_place(given, options))}".rstrip()
        return options


def without_place(arguments: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Write DATA for the folder of data: where it lies is nobody's business."""
    root = getattr(options, "data_root", None)
    if root is None:
        return list(arguments)
    place = re.compile(rf"(^|=){re.escape(str(root))}(?=/|$)")
    return [place.sub(r"\1DATA", argument) for argument in arguments]


def share(text: str) -> float:
    """Read a share in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return value


def begin(options: argparse.Namespace, width: int = 160) -> Console:
    """Begin as the options say: with so many threads, a folder for results, and a console.

    Args:
        options: With ``threads`` and ``out``.
        width: Characters of a line where the output is no terminal.
    """
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)
