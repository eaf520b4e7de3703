"""Settings of every test run."""

import pytest
import torch
from hypothesis import settings

from tests.processes import run as run

# The nets are tiny: one thread is faster than several that wait for each other, and results are the same everywhere.
torch.set_num_threads(1)

# The same examples in every run, so that a failure is the fault of the change at hand; new ones are for --slow to find.
settings.register_profile("usual", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=5000, deadline=None, derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this test suite."""
    parser.addoption("--slow", action="store_true", help="5,000 new random architectures rather than the usual 200")


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples hypothesis draws where a test does not say so itself."""
    settings.load_profile("slow" if config.getoption("--slow") else "usual")
