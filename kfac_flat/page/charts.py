"""Small line charts as SVG that is part of the page: its colours follow the page's, its values are shown on hover."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kfac_flat.page.markup import Markup, element, joined

WIDTH, HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 350, 10, 160  # edges of what is drawn in
_HOVERED = 120  # points of a chart that can be asked for their values
_LOGARITHMIC = 50  # times as large as the smallest is the largest of values that are drawn on a logarithmic scale


def plain(value: float) -> str:
    """Write a value of unknown kind."""
    return f"{value:.4g}"


def compact(value: float) -> str:
    """Write a number in few characters.

    Example:
        >>> compact(0.25), compact(2_116_224), compact(77_290)
        ('0.25', '2.12M', '77.3k')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Series:
    """Values over the epochs.

    Attributes:
        title: What they are.
        points: Epochs and values; where a value is not finite, the line is broken.
        form: How a value is written.
        tick: How it is written at the axis.
        steps: Whether a value holds from its epoch until the next.
        from_zero: Whether the axis begins at zero.
    """

    title: str
    points: Sequence[tuple[int, float]]
    form: Callable[[float], str] = plain
    tick: Callable[[float], str] = compact
    steps: bool = False
    from_zero: bool = False

    @property
    def known(self) -> list[tuple[int, float]]:
        """Those that can be drawn."""
        return [(epoch, value) for epoch, value in self.points if math.isfinite(value)]

    @property
    def summary(self) -> str:
        """The chart in words."""
        known = self.known
        if not known:
            return f"{self.title}: no finite value"
        values = [value for _, value in known]
        (first, start), (last, end) = known[0], known[-1]
        return (
            f"{self.title} over the epochs: {self.form(start)} at epoch {first}, {self.form(end)} at epoch {last}, "
            f"lowest {self.form(min(values))}, highest {self.form(max(values))}"
        )


@dataclass(frozen=True)
class Scale:
    """An axis: the values at its ends, where these stand in the picture, and whether it is logarithmic.

    Example:
        >>> Scale(0, 10, 100, 200)(2.5)
        125.0
        >>> Scale(1, 100, 0, 10, logarithmic=True)(10)
        5.0
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value stands."""
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, number: int) -> list[float]:
        """Return about so many round values on the axis.

        Example:
            >>> Scale(0, 77_290, 0, 1).ticks(4)
            [0.0, 20000.0, 40000.0, 60000.0]
            >>> Scale(0.5, 300, 0, 1, logarithmic=True).ticks(4)
            [1.0, 10.0, 100.0]
        """
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**power for power in powers[:: math.ceil(len(powers) / number)]]
        step = _round_step((self.high - self.low) / number)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5, 10, 20, ... (and 0.5, 0.25, ...) that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= least * (1 - 1e-9))


def value_scale(series: Series) -> Scale:
    """Choose the vertical axis of a chart."""
    values = [value for _, value in series.known] or [0.0]
    low, high = min(values), max(values)
    if not series.from_zero and low > 0 and high / low > _LOGARITHMIC:
        return Scale(low / 1.3, high * 1.3, _BOTTOM, _TOP, logarithmic=True)
    if series.from_zero:
        low = 0.0
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0  # a constant needs an axis as well
    return Scale(low if series.from_zero else low - room, high + room, _BOTTOM, _TOP)


def chart(series: Series, epochs: tuple[int, int], marked: Collection[int]) -> Markup:
    """Draw a figure with its title, its last value, and a summary for those who cannot see it.

    Args:
        series: What to draw.
        epochs: The first and last of the horizontal axis.
        marked: Epochs that are marked on it.
    """
    first, last = epochs
    x = Scale(first, max(last, first + 1), _LEFT, _RIGHT)
    y = value_scale(series)
    known = series.known
    drawing = element(
        "svg",
        _axes(x, y, series.tick),
        element("path", d="".join(f"M{x(e):.1f} {_BOTTOM - 5}v10" for e in sorted(marked)), class_="marks"),
        element("path", d=_path(series, x, y), class_="line"),
        joined(_hovers(series, x, y)),
        *(element("circle", cx=f"{x(e):.1f}", cy=f"{y(v):.1f}", r=3.5, class_="last") for e, v in known[-1:]),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=series.summary,
    )
    caption = element(
        "figcaption",
        element("span", series.title, *([" (log scale)"] if y.logarithmic else [])),
        *(element("b", series.form(value)) for _, value in known[-1:]),
    )
    return element("figure", caption, drawing)


def _axes(x: Scale, y: Scale, tick: Callable[[float], str]) -> Markup:
    values, epochs = y.ticks(5), [e for e in x.ticks(8) if e == int(e)]
    return joined(
        [
            element("path", d="".join(f"M{_LEFT} {y(v):.1f}H{_RIGHT}" for v in values), class_="grid"),
            *(element("text", tick(v), x=_LEFT - 7, y=f"{y(v) + 4:.1f}", class_="y") for v in values),
            element("path", d=f"M{_LEFT} {_BOTTOM}H{_RIGHT}", class_="axis"),
            *(element("text", f"{e:.0f}", x=f"{x(e):.1f}", y=_BOTTOM + 20) for e in epochs),
        ]
    )


def _path(series: Series, x: Scale, y: Scale) -> str:
    """Join the points that follow each other, anew behind each gap."""
    written, open_ = [], False
    for epoch, value in series.points:
        if not math.isfinite(value):
            open_ = False
            continue
        across, up = f"{x(epoch):.1f}", f"{y(value):.1f}"
        step = f"H{across}V{up}" if series.steps else f"L{across} {up}"
        written.append(step if open_ else f"M{across} {up}")
        open_ = True
    return "".join(written)


def _hovers(series: Series, x: Scale, y: Scale) -> list[Markup]:
    """Make points tell their values under the pointer: all of them, or evenly chosen ones where there are many."""
    known = series.known
    chosen = known[:: max(1, math.ceil(len(known) / _HOVERED))]
    half = (_RIGHT - _LEFT) / max(1, len(chosen) - 1) / 2
    return [_hover(x(epoch), y(value), half, f"epoch {epoch}: {series.form(value)}") for epoch, value in chosen]


def _hover(x: float, y: float, half: float, told: str) -> Markup:
    left, right = max(_LEFT, x - half), min(_RIGHT, x + half)
    return element(
        "g",
        element("title", told),
        element("rect", x=f"{left:.1f}", y=_TOP, width=f"{right - left:.1f}", height=_BOTTOM - _TOP),
        element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4),
    )
