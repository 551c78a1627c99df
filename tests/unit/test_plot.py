"""Pictures are well-formed SVG, whatever numbers and names go in, and put every point where its value says."""

import math
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.plot import BOTTOM, HEIGHT, LEFT, RIGHT, SHARES, TOP, WIDTH, bars, lines, ticks

SVG = "{http://www.w3.org/2000/svg}"
sane = st.floats(-1e12, 1e12, allow_subnormal=False)
printable = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cn", "Cc"]), max_size=12)


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def curves(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = []
    for line in root.iter(f"{SVG}polyline"):
        pairs = [pair.split(",") for pair in line.attrib["points"].split()]
        found.append([(float(a), float(b)) for a, b in pairs])
    return found


# Ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3, 1000, [200, 400, 600, 800, 1000]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (2.31, 2.34, [2.31, 2.32, 2.33, 2.34]),
    ],
)
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(low=st.floats(-1e9, 1e9), width=st.floats(1e-3, 1e9))
def test_ticks_are_few_even_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width)
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert 1 <= len(found) <= 7
    assert all(low - slack <= tick <= low + width + slack for tick in found)
    steps = [b - a for a, b in pairwise(found)]
    assert all(step == pytest.approx(steps[0], rel=1e-3) for step in steps)


# Lines


def test_points_stand_where_their_values_say() -> None:
    root = parsed(lines({"loss": [(0, 0.0), (5, 1.0), (10, 4.0)]}, title="t", x="step", y="nats"))
    floor, ceiling, right = HEIGHT - BOTTOM, TOP, WIDTH - RIGHT
    middle = floor - (floor - ceiling) / 4
    assert curves(root) == [[(LEFT, floor), ((LEFT + right) / 2, middle), (right, ceiling)]]
    assert {"t", "step", "nats", "loss", "0", "2", "10"} <= set(texts(root))
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", lines({}, title="", x="", y=""))


def test_points_that_are_no_numbers_are_left_out() -> None:
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (math.nan, 3.0), (3, 2.0)]
    plain = lines({"a": [(0, 1.0), (3, 2.0)]}, title="t", x="x", y="y")
    assert lines({"a": points}, title="t", x="x", y="y") == plain
    assert "nan" not in lines({"a": [(0, math.nan)], "b": []}, title="t", x="x", y="y")


def test_zero_belongs_to_the_picture_where_asked() -> None:
    series = {"a": [(0, 5.0), (1, 6.0)]}
    (high,), (low,) = (
        curves(parsed(lines(series, title="", x="", y="", y_from_zero=zero))) for zero in (True, False)
    )
    assert high[0][1] < low[0][1] == HEIGHT - BOTTOM


@given(st.dictionaries(printable, st.lists(st.tuples(sane, sane), max_size=4), max_size=9), st.booleans())
def test_any_lines_are_a_picture(series: Any, zero: bool) -> None:
    root = parsed(lines(series, title="t", x="x", y="y", y_from_zero=zero))
    assert len(curves(root)) == len(series) and set(series) <= set(texts(root))
    for a, b in (point for curve in curves(root) for point in curve):
        assert LEFT - 1 <= a <= WIDTH - RIGHT + 1 and TOP - 1 <= b <= HEIGHT - BOTTOM + 1


def test_names_cannot_break_out() -> None:
    evil = "</text><script>\"&'"
    for svg in (
        lines({evil: [(0, 1)]}, title=evil, x=evil, y=evil),
        bars({evil: 1.0}, title=evil, unit=evil),
    ):
        root = parsed(svg)
        assert not list(root.iter(f"{SVG}script")) and "<script" not in svg
        assert evil in texts(root) and root.attrib["aria-label"] == evil


def test_shares_have_an_axis_of_their_own() -> None:
    shares = {"right": [(0, 0.0), (5, 0.5), (10, 1.0), (11, math.nan)]}
    root = parsed(lines({"loss": [(0, 3.0), (10, 1.0)]}, title="t", x="x", y="y", shares=shares))
    loss, right = curves(root)
    floor, wide = HEIGHT - BOTTOM, WIDTH - SHARES
    assert loss == [(LEFT, TOP), (wide, floor)]
    assert right == [(LEFT, floor), ((LEFT + wide) / 2, (floor + TOP) / 2), (wide, TOP)]
    assert {"loss", "right", "0 %", "50 %", "100 %"} <= set(texts(root))
    plain = lines({"loss": [(0, 3.0)]}, title="t", x="x", y="y")
    assert lines({"loss": [(0, 3.0)]}, title="t", x="x", y="y", shares={}) == plain


# Bars


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_a_gap_that_says_so(missing: float) -> None:
    values = {"sun": 40.0, "lost": missing, "base": 20.0}
    intervals = {"sun": (35.0, missing), "lost": (missing, missing), "base": (15.0, 30.0)}
    root = parsed(bars(values, title="accuracy", unit="%", intervals=intervals))
    long = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if "rx" in r.attrib and "y" in r.attrib]
    assert long == [pytest.approx(2 * long[1], abs=0.2), long[1]]
    assert texts(root).count("no number") == 1 and "lost" in texts(root)
    assert len(list(root.iter(f"{SVG}line"))) == 1
    assert "no number" in bars({"only": missing}, title="t", unit="%")


def test_bars_are_as_long_as_their_values_and_wear_whiskers() -> None:
    values = {"base": 20.0, "sun": 40.0, "lost": -3.0}
    root = parsed(bars(values, title="accuracy", unit="%", intervals={"sun": (35.0, 50.0)}))
    long = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if "rx" in r.attrib and "y" in r.attrib]
    assert long[1] == pytest.approx(2 * long[0], abs=0.2) and long[2] == 0
    (whisker,) = root.iter(f"{SVG}line")
    low, high = float(whisker.attrib["x1"]), float(whisker.attrib["x2"])
    left = high - long[1] * 50 / 40  # the whisker's end is 50 of what the bar is 40 of
    assert low == pytest.approx(left + long[1] * 35 / 40, abs=0.2)
    assert {"base", "sun", "lost", "20 %", "40 %", "-3 %"} <= set(texts(root))


@given(
    st.dictionaries(printable, st.tuples(sane, sane, sane), max_size=8),
    printable,
)
def test_any_bars_are_a_picture(facts: dict[str, tuple[float, float, float]], unit: str) -> None:
    values = {name: value for name, (value, _, _) in facts.items()}
    intervals = {name: (min(a, b), max(a, b)) for name, (_, a, b) in facts.items()}
    root = parsed(bars(values, title="t", unit=unit, intervals=intervals))
    assert len(list(root.iter(f"{SVG}line"))) == len(values)
    for rect in root.iter(f"{SVG}rect"):
        if "y" in rect.attrib:
            assert 0 <= float(rect.attrib["width"]) <= WIDTH
    parsed(bars(values, title="t", unit=unit))


def test_whiskers_and_lonely_points() -> None:
    root = parsed(
        lines(
            {"a": [(0, 1), (2, 3)], "b": [(1, 2)]},
            title="t",
            x="x",
            y="y",
            intervals={"a": [(0, 0.5, 1.5), (2, 2, 9), (1, math.nan, 2)], "gone": [(0, 0, 99)]},
        )
    )
    drawn = [line for line in root.iter(f"{SVG}line") if "stroke" in line.attrib]
    assert len(drawn) == 2 and all(line.attrib["x1"] == line.attrib["x2"] for line in drawn)
    (dot,) = root.iter(f"{SVG}circle")
    assert list(map(len, curves(root))) == [2, 1]
    # The longest whisker is inside the picture: the scale knows of it.
    assert min(float(line.attrib["y2"]) for line in drawn) >= TOP
    assert LEFT <= float(dot.attrib["cx"]) <= WIDTH - RIGHT
