"""Python's cyclic garbage collector, held back where many objects are made that all live on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Do not look for garbage meanwhile; also a decorator.

    A traced model is tens of thousands of objects. While they are made, the collector goes time and again through
    everything that the process holds, torch included, and finds nothing: about a quarter of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
