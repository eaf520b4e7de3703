"""Changes that are made all together or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """Something to be done that has been prepared, so that doing it needs next to nothing.

    Attributes:
        make: Does it.
        take_back: Puts everything back as it was, whether or not it has been done.
    """

    make: Callable[[], object]
    take_back: Callable[[], object]


def make_all(changes: Sequence[Change]) -> None:
    """Make all changes in order. Whatever one of them raises comes out again when all have been taken back.

    Example:
        >>> bag = {"apples": 1}
        >>> make_all([updating(bag, {"apples": 2}), Change(lambda: 1 / 0, lambda: None)])
        Traceback (most recent call last):
        ZeroDivisionError: division by zero
        >>> bag
        {'apples': 1}
    """
    try:
        for change in changes:
            change.make()
    except BaseException:  # an interrupt as well
        for change in reversed(changes):
            change.take_back()
        raise


def setting(holder: object, values: Mapping[str, Any]) -> Change:
    """Give attributes that are there already new values."""
    before = {name: getattr(holder, name) for name in values}
    return Change(lambda: _set(holder, values), lambda: _set(holder, before))


def updating(mapping: dict[Any, Any], values: Mapping[Any, Any]) -> Change:
    """Give keys that are there already new values."""
    before = {key: mapping[key] for key in values}
    return Change(lambda: mapping.update(values), lambda: mapping.update(before))


def appending(items: list[Any], item: object) -> Change:
    """Append an item to a list."""
    length = len(items)
    return Change(lambda: items.append(item), lambda: items.__delitem__(slice(length, None)))


def truncating(items: list[Any], length: int) -> Change:
    """Cut a list to a length."""
    rest, gone = slice(length, None), items[length:]
    return Change(lambda: items.__delitem__(rest), lambda: items.__setitem__(rest, gone))


def _set(holder: object, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(holder, name, value)
