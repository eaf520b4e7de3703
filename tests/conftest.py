"""Settings of every test run."""

import pytest
import torch
from hypothesis import settings

from tests.processes import run as run

# Not to be imported in search of doctests: the device would be there for all tests. test_pretend_gpu.py runs them.
collect_ignore = ["on_pretend_gpu.py", "pretend_gpu.py"]

# The nets are tiny: one thread is faster than several that wait for each other, and results are the same everywhere.
torch.set_num_threads(1)

# The same examples in every run, so that a failure is the fault of the change at hand; new ones are for --slow to find.
settings.register_profile("usual", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=5000, deadline=None, derandomize=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this test suite."""
    about = "5,000 new random architectures rather than the usual 200, and tests that are marked as slow"
    parser.addoption("--slow", action="store_true", help=about)


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many examples hypothesis draws where a test does not say so itself."""
    settings.load_profile("slow" if config.getoption("--slow") else "usual")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as slow, if it is not asked for."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
