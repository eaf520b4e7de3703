"""Running a scenario in several processes that talk to each other over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import torch.distributed as dist

PATIENCE = 20  # seconds that a process waits for another; no test comes near it
Scenario = Callable[[int], Any]


class RunInProcesses(Protocol):
    """Runs a scenario in each of several processes; returns what it returned there, None for one that was killed."""

    def __call__(self, scenario: Scenario, ranks: int = 2) -> list[Any]: ...


def _rank(scenario: Scenario, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    torch.save(scenario(rank), folder / f"{rank}.pt")
    if rank == 0:
        (folder / "done").touch()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunInProcesses]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "kfac_flat"])  # torch is imported once, not once a process
    processes: list[Any] = []

    def run(scenario: Scenario, ranks: int = 2) -> list[Any]:
        processes.extend(context.Process(target=_rank, args=(scenario, r, ranks, tmp_path)) for r in range(ranks))
        for process in processes:
            process.start()
        for process in processes:
            process.join(3 * PATIENCE)
        assert all(process.exitcode in (0, -signal.SIGKILL) for process in processes), "see the traceback above"
        files = [tmp_path / f"{rank}.pt" for rank in range(ranks)]
        return [torch.load(file) if file.exists() else None for file in files]

    yield run
    for process in processes:
        process.kill()
        process.join()
