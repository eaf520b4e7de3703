"""The example in several processes, started as its text says."""

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_replicas_lose_half_of_their_neurons_and_stay_alike(ranks: int) -> None:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "examples.ddp", "--epochs", "4", "--width", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith(f"{ranks} processes, the same weights in all")
    last = re.fullmatch(r"epoch 4: (\d+)% of neurons removed, accuracy ([\d.]+) %, rho (.+)", lines[-2])
    assert last
    assert 45 <= int(last[1]) <= 52  # tied neurons go together
    assert float(last[2]) > 60
    assert float(last[3]) > 0
