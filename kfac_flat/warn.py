"""Warnings that point at the user's own line, whatever lies between it and the code that warns."""

from __future__ import annotations

import sys
import warnings

_NOT_USERS = ("kfac_flat", "baselines", "torch", "contextlib")


def warn_user(message: str) -> None:
    """Warn at the innermost line that is neither this library's, the baselines', torch's, nor a decorator's.

    Between a step and the line that calls it there are frames of torch's own, more of them with a closure or once a
    learning-rate scheduler has been made for the optimizer.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
