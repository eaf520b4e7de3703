"""What can go wrong with a cut."""

from __future__ import annotations


class CutError(RuntimeError):
    """A cut cannot be made, or would not leave a model that computes what it should; nothing has been changed."""
