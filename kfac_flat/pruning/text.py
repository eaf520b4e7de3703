"""Names and numbers as plain text, in columns that fit the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def fewer(before: int, after: int) -> str:
    """Say how many times fewer there are."""
    if after == before:
        return "unchanged"
    return f"{before / after:.2f}x fewer" if after else "none left"


def percent(part: float, whole: float) -> str:
    """Write a share; what is nearly all or nearly nothing is not written as if it were.

    Example:
        >>> percent(1, 4), percent(9_999, 10_000), percent(10_000, 10_000), percent(1, 10_000), percent(0, 0)
        ('25.0%', '>99.9%', '100.0%', '<0.1%', '0.0%')
    """
    written = f"{part / whole if whole else 0:.1%}"
    if written == "100.0%" and part < whole:
        return ">99.9%"
    return "<0.1%" if written == "0.0%" and part > 0 else written


def shortened(name: str, length: int) -> str:
    """Shorten a module's name to at most this length, the middle of its longest words first.

    Numbers stay, as they tell one layer from the next.

    Example:
        >>> shortened("features.denseblock3.denselayer24.conv2", 30)
        'fea~res.den~ck3.den~r24.conv2'
    """
    for longest in range(length, 3, -1):
        short = ".".join(_without_middle(word, longest) for word in name.split("."))
        if len(short) <= length:
            return short
    return _without_middle(name, length)


def _without_middle(text: str, length: int) -> str:
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}~{text[len(text) - (length - 1 - head) :]}"


def aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Align a table's columns, the first to the left and shortened as lines of this width ask for."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(width - sum(w + 2 for w in widths[1:]), 12)
    widths[0] = min(widths[0], room)
    return [
        "  ".join(
            [shortened(first, room).ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()
        for first, *rest in rows
    ]


def by_reason(frozen: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of the layers that stay, by the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        names.setdefault(reason, []).append(name)
    return names
