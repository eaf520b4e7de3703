"""What needs no GPU of what is to hold on one: devices are not mixed, and no step makes the host wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch knows no devices that are written in Python",
)
def test_all_is_as_on_the_cpu_on_a_device_that_is_not_the_cpu() -> None:
    cases = Path(__file__).with_name("on_pretend_gpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    ran = subprocess.run(command, cwd=cases.parents[1], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
