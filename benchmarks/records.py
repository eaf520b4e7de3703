"""Records of runs: one line of JSON each, added when a run is done and never changed, with how they were made."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kfac_flat

Record = dict[str, Any]

# What it means that lines from before there was such an entry lack it.
UNSAID: Record = {"budget": "neurons", "amp": None, "pretrained": None}

ROOT = Path(__file__).parents[1]


def read_records(path: Path) -> list[Record]:
    """Read what is there.

    Raises:
        SystemExit: if a line cannot be read; nothing is ever mended here.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}, is no JSON ({error}): mend or delete this line") from error
    return records


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, in one write, so that runs going on at the same time may share a file."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def make_missing(
    planned: Iterable[Record],
    names: Sequence[str],
    file_of: Callable[[Record], Path],
    make: Callable[[Record, Callable[[float], None]], Record],
    about: Record,
    console: Console,
    notes: Callable[[Record], str] = lambda _: "",
) -> None:
    """Make the runs that are not there yet, each written down and told of when it is done.

    Args:
        planned: What is to be run, in this order.
        names: The entries that make two runs the same run.
        file_of: Where a run is written down.
        make: Makes a run, and returns what came of it, ``accuracy`` and ``seconds`` among it. By its second argument it
            may tell that a share of it is done.
        about: Circumstances of all runs.
        console: Where progress and results are shown.
        notes: What is told of a result besides.
    """
    planned = list(planned)
    there = {identity(record, names) for file in {*map(file_of, planned)} for record in read_records(file)}
    missing = [record for record in planned if identity(record, names) not in there]
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(missing))
        for number, record in enumerate(missing, 1):
            label = " ".join(str(value) for value in identity(record, names) if value is not None)
            progress.update(bar, description=label)
            found = make(record, lambda share: progress.advance(bar, share))
            append(file_of(record), record | found | about)
            progress.update(bar, completed=number)
            told = f"{label}: {found['accuracy']:.2f} %, {found['seconds']:.1f} s{notes(found)}"
            console.print(told, soft_wrap=True, highlight=False)


def in_file_of_task(folder: Path) -> Callable[[Record], Path]:
    """Write each task's runs down in a file of its own."""
    return lambda record: folder / f"{record['task']}.jsonl"


def identity(record: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """Return the entries that make two runs the same run."""
    return tuple(record[name] if name in record else UNSAID[name] for name in names)


def circumstances(command: str, threads: int, device: str = "cpu", packages: Iterable[str] = ("torch",)) -> Record:
    """Say with what, on what and when something is measured."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": command,
        "revision": revision or "unknown",
        "versions": {
            "python": platform.python_version(),
            "kfac-flat": kfac_flat.__version__,
            **{package: metadata.version(package) for package in packages},
        },
        "hardware": hardware(torch.device(device)),
        "threads": threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def hardware(device: torch.device) -> str:
    """Name the model of what computes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Read the processor's name from where Linux has it, or ask the platform."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def progress_bar(console: Console) -> Progress:
    """Make a bar that is gone when the table comes; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def write_tables(
    path: Path, tables: Iterable[Table], lines: Iterable[str], console: Console | None = None, width: int = 160
) -> None:
    """Write tables and the lines under them into a file of that width, and show them on the console, if any."""
    tables, lines = list(tables), list(lines)
    with path.open("w") as file:
        for target in (*([console] if console else []), Console(file=file, width=width)):
            for table in tables:
                target.print(table)
            for line in lines:
                target.print(line, soft_wrap=True, highlight=False, markup=False)


def one_line(value: Any) -> str:
    """Write a value, or names with their values, on one line."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def how_made(records: Sequence[Record]) -> Iterable[str]:
    """Say under which circumstances records were made, each once."""
    for what in ("command", "revision", "versions", "hardware", "threads"):
        yield f"{what}: {'; '.join(dict.fromkeys(one_line(r[what]) for r in records))}"
    yield f"{len(records)} runs, {sum(r['seconds'] for r in records):,.0f} s of training"


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Write mean and standard deviation; one value has no deviation."""
    written = form.format(mean(values))
    return f"{written} ± {form.format(stdev(values)).lstrip('+')}" if len(values) > 1 else written
