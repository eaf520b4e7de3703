"""A training that is killed again and again ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.pruning.resumable import EVENTS, FIRST_CUT, SAVE_EVERY, STEPS, STEPS_AN_EPOCH, Run
from tests.pruning.test_surgery import assert_same

ROOT = Path(__file__).parents[2]


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.pruning.resumable", str(path), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def killed_after(step: int, delay: float, path: Path, *options: str) -> dict[str, Any]:
    """Run until a step has been taken, kill while checkpoints are being written, return the one that is there."""
    with start(path, "--linger", str(step), *options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{step}\n"
        time.sleep(delay)
        process.kill()
    return torch.load(path, weights_only=True)


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [t for value in values for t in tensors(value)]


def test_a_training_that_is_killed_before_between_and_after_cuts_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = Run.new(seed=0)
    while whole.step < STEPS:
        whole.take_a_step()
    assert [bool(report) for report in whole.pruner.history] == [False, True, True, True, False, False]

    cuts = [STEPS_AN_EPOCH * epoch for epoch in range(FIRST_CUT, FIRST_CUT + EVENTS)]
    draw, path = random.Random(0), tmp_path / "checkpoint.pt"
    ranges = [  # of steps to be killed at, and how many cuts the last checkpoint then has behind it
        (SAVE_EVERY, cuts[0], {0}),
        (cuts[0] + SAVE_EVERY, cuts[-1], {1, 2}),
        (cuts[-1] + SAVE_EVERY, STEPS, {EVENTS}),
    ]
    amid_an_epoch = 0
    for seed, (low, high, events) in enumerate(ranges):
        step = draw.randrange(low, high)
        again = ("--resume", "--seed", str(seed)) if seed else ()  # another seed: all must come from the checkpoint
        saved = killed_after(step, draw.uniform(0, 0.05), path, *again)
        assert saved["step"] == step - step % SAVE_EVERY
        assert saved["pruner"]["event"] in events
        amid_an_epoch += saved["step"] % STEPS_AN_EPOCH > 0
    assert amid_an_epoch
    with start(path, "--resume", "--seed", "9") as process:
        assert process.wait() == 0

    found, expected = torch.load(path, weights_only=True), whole.state_dict()
    assert found["step"] == STEPS
    assert len(tensors(found)) > 40
    assert_same(found, expected)
