"""Charts stand for their values: what is drawn is read back and compared."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kfac_flat.page import charts
from kfac_flat.page.charts import Scale, Series
from tests.page.reading import Element, parsed

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12)


def drawn(series: Series, last: int | None = None, marked: tuple[int, ...] = ()) -> Element:
    return parsed(charts.chart(series, (0, series.points[-1][0] if last is None else last), marked)).one("figure")


def series(values: list[float], **options: object) -> Series:
    return Series("accuracy", list(enumerate(values)), **options)


def corners(figure: Element) -> list[tuple[float, float]]:
    """Points of the line, in the picture's coordinates."""
    path = figure.one("path", class_="line").attributes["d"]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def affine(at: list[float], values: list[float], tolerance: float) -> None:
    """Assert that one is the other, moved and stretched, to the rounding of what is drawn."""
    low, high = values.index(min(values)), values.index(max(values))
    slope = (at[high] - at[low]) / (values[high] - values[low])
    for position, value in zip(at, values, strict=True):
        assert position == pytest.approx(at[low] + slope * (value - values[low]), abs=tolerance)


@given(VALUES, st.booleans())
def test_lines_go_through_the_values(values: list[float], from_zero: bool) -> None:
    values = [abs(v) for v in values] if from_zero else values
    assume(max(values) - min(values) > 1e-3 * max(map(abs, values)))
    figure = drawn(series(values, from_zero=from_zero))
    logarithmic = "log scale" in figure.one("figcaption").text
    points = corners(figure)
    assert len(points) == len(values)
    affine([x for x, _ in points], list(range(len(values))), 0.15)
    affine([y for _, y in points], [math.log(v) for v in values] if logarithmic else values, 0.15)
    lowest, highest = points[values.index(min(values))], points[values.index(max(values))]
    assert lowest[1] > highest[1], "up is more"
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in points)


@given(VALUES)
def test_the_axis_tells_the_values_at_which_its_lines_stand(values: list[float]) -> None:
    assume(max(values) - min(values) > 1e-3 * max(map(abs, values)))
    figure = drawn(series(values, tick=repr))
    assume("log scale" not in figure.one("figcaption").text)
    ticks = [(float(t.text), float(t.attributes["y"]) - 4) for t in figure.all("text", class_="y")]
    assert 2 <= len(ticks) <= 12
    lines = [float(y) for y in re.findall(r"M\d+ (-?[\d.]+)H", figure.one("path", class_="grid").attributes["d"])]
    assert [y for _, y in ticks] == pytest.approx(lines, abs=0.11)
    affine([y for _, y in ticks] + [y for _, y in corners(figure)], [v for v, _ in ticks] + values, 0.3)


@given(VALUES)
def test_an_axis_from_zero_has_it_at_its_foot_whatever_the_magnitudes(values: list[float]) -> None:
    scale = charts.value_scale(series([abs(v) for v in values], from_zero=True))
    assert (scale.low, scale.logarithmic) == (0.0, False)
    assert scale(0.0) > scale(scale.high), "up is more"


def test_epochs_are_written_where_their_values_stand_and_the_last_one_has_a_dot() -> None:
    figure = drawn(series([3.0, 5.0, 2.0, 4.0, math.nan]), last=4)
    at = [x for x, _ in corners(figure)]
    written = {int(t.text): float(t.attributes["x"]) for t in figure.all("text") if "class" not in t.attributes}
    assert written.keys() == {0, 1, 2, 3, 4}
    assert [written[epoch] for epoch in range(4)] == at
    dot = figure.one("circle", class_="last").attributes
    assert (float(dot["cx"]), float(dot["cy"])) == corners(figure)[-1]


@pytest.mark.parametrize("low", [1e-6, 1.0, 3e5])
def test_values_of_many_magnitudes_are_drawn_on_a_logarithmic_axis(low: float) -> None:
    values = [low * factor for factor in (1, 10, 1000, 70)]
    figure = drawn(series(values, tick=repr))
    assert "(log scale)" in figure.one("figcaption").text
    ticks = [(float(t.text), float(t.attributes["y"]) - 4) for t in figure.all("text", class_="y")]
    assert ticks
    affine(
        [y for _, y in ticks] + [y for _, y in corners(figure)],
        [math.log(v) for v in [v for v, _ in ticks] + values],
        0.3,
    )


@pytest.mark.parametrize("values", [[3.0, 3.0], [0.0, 0.0, 0.0], [-2.0], [1e300, -1e300], [5e-324, 0.0]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_what_hardly_is_a_curve_is_drawn_all_the_same(values: list[float], from_zero: bool) -> None:
    figure = drawn(series(values, from_zero=from_zero and min(values) >= 0))
    assert len(corners(figure)) == len(values)
    assert "nan" not in figure.one("svg").attributes["aria-label"]


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_the_line_is_broken_where_there_is_no_value(gap: float) -> None:
    figure = drawn(series([1.0, 2.0, gap, 4.0, 5.0]))
    path = figure.one("path", class_="line").attributes["d"]
    assert [part.count("L") for part in path.split("M")[1:]] == [1, 1]
    assert [x for x, _ in corners(figure)] == sorted({x for x, _ in corners(figure)})


def test_without_any_value_the_chart_says_so() -> None:
    figure = drawn(series([math.nan, math.nan]))
    assert figure.one("svg").attributes["aria-label"] == "accuracy: no finite value"


def test_steps_hold_until_the_next_value() -> None:
    figure = drawn(series([4.0, 4.0, 1.0, 2.0], steps=True))
    path = figure.one("path", class_="line").attributes["d"]
    moves = re.findall(r"([MHV])(-?[\d.]+)", path)
    assert "".join(kind for kind, _ in moves) == "MHVHVHV"
    heights = [float(y) for kind, y in moves if kind == "V"]
    assert heights[0] < heights[2] < heights[1]


def test_every_value_is_told_under_the_pointer_where_it_stands() -> None:
    values = [90.0, 97.25, 95.5]
    figure = drawn(series(values))
    assert [g.one("title").text for g in figure.all("g")] == ["epoch 0: 90", "epoch 1: 97.25", "epoch 2: 95.5"]
    for group, (x, y) in zip(figure.all("g"), corners(figure), strict=True):
        circle, hit = group.one("circle").attributes, group.one("rect").attributes
        assert (float(circle["cx"]), float(circle["cy"])) == (x, y)
        assert float(hit["x"]) <= x <= float(hit["x"]) + float(hit["width"])


def test_long_runs_stay_small_and_their_line_complete() -> None:
    figure = charts.chart(series([math.sin(i / 50) for i in range(5000)]), (0, 4999), ())
    root = parsed(figure)
    assert len(corners(root)) == 5000
    assert len(root.all("g")) <= 120
    assert len(figure) < 120_000


def test_the_summary_tells_first_last_lowest_and_highest() -> None:
    label = drawn(series([2.0, 9.5, 1.25, 3.0])).one("svg").attributes["aria-label"]
    assert label == "accuracy over the epochs: 2 at epoch 0, 3 at epoch 3, lowest 1.25, highest 9.5"
    assert drawn(series([2.0, 9.5])).one("figcaption").one("b").text == "9.5"


def test_marks_stand_at_their_epochs() -> None:
    figure = drawn(series([1.0, 2.0, 3.0, 4.0]), marked=(1, 3))
    at = [float(x) for x in re.findall(r"M(-?[\d.]+)", figure.one("path", class_="marks").attributes["d"])]
    assert at == [corners(figure)[1][0], corners(figure)[3][0]]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_inside_the_axis_and_neither_few_nor_many(low: float, width: float, number: int) -> None:
    assume(width > 1e-6 * abs(low))
    scale = Scale(low, low + width, 0, 1)
    ticks = scale.ticks(number)
    steps = {b - a for a, b in pairwise(ticks)}
    assert number / 3 <= len(ticks) + 1 <= number + 2
    assert all(low - 1e-6 * width <= t <= low + 1.000001 * width for t in ticks)
    for step in steps:
        mantissa = float(f"{step:.3e}".partition("e")[0])
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 0.01


@given(st.floats(1e-9, 1e14))
def test_compact_numbers_say_nearly_the_same(value: float) -> None:
    written = charts.compact(value)
    units = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    factor = units.get(written[-1], 1.0)
    assert float(written.rstrip("TGMk")) * factor == pytest.approx(value, rel=0.006)
    assert len(written) <= 9
