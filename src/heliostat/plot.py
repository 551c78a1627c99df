"""Small pictures as inline SVG: lines and bars, no library, no network, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#3566c8", "#d1642b", "#2f8f5b", "#a03fa6", "#8a7a1d", "#5b6b7a", "#c23b56", "#1d8a96")
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44
SHARES = 56
"""Margin on the right where there is an axis of shares."""


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x: str,
    y: str,
    y_from_zero: bool = False,
    shares: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    intervals: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> str:
    """A line chart; ``series`` maps a label to (x, y) points. Points that are not finite are left out.

    ``shares``: series in [0, 1], drawn dashed over an axis of their own on the right. ``intervals``: (x, low, high)
    of points of a series, drawn as whiskers. A series of one point is a dot.
    """
    left, right = _finite(series), _finite(shares or {})
    whiskers = {
        name: [edges for edges in spans if all(map(math.isfinite, edges))]
        for name, spans in (intervals or {}).items()
        if name in left
    }
    every = [point for points in left.values() for point in points] or [(0.0, 0.0)]
    xs = [a for points in (*left.values(), *right.values()) for a, _ in points] or [0.0]
    ys = [b for _, b in every] + [y for spans in whiskers.values() for _, *ends in spans for y in ends]
    low = min(0.0, *ys) if y_from_zero else min(ys)
    margin = SHARES if right else RIGHT
    scale = _Scale(min(xs), max(xs), low, max(ys), margin)
    parts = [_frame(title, x, y, scale)]
    for name, points in left.items():
        number = len(parts) - 1
        parts.append(_curve(scale, points, number, name) + _whiskers(scale, whiskers.get(name, ()), number))
    if right:
        share = _Scale(min(xs), max(xs), 0.0, 1.0, margin)
        parts += [
            _curve(share, points, len(left) + n, name, dashed=True)
            for n, (name, points) in enumerate(right.items())
        ]
        parts.append(_right_axis(share))
    return _svg(parts, title)


def _finite(series: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b)]
        for name, points in series.items()
    }


def _curve(
    scale: _Scale, points: Sequence[tuple[float, float]], number: int, name: str, *, dashed: bool = False
) -> str:
    colour, dash = COLOURS[number % len(COLOURS)], ' stroke-dasharray="5 3"' if dashed else ""
    path = " ".join(f"{scale.x(a):.1f},{scale.y(b):.1f}" for a, b in points)
    line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.8"{dash} points="{path}"/>'
    if len(points) == 1:
        x, y = path.split(",")
        line += f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'
    return line + _key(number, name, colour)


def _whiskers(scale: _Scale, spans: Sequence[tuple[float, float, float]], number: int) -> str:
    colour = COLOURS[number % len(COLOURS)]
    return "".join(
        f'<line x1="{scale.x(x):.1f}" x2="{scale.x(x):.1f}" y1="{scale.y(low):.1f}" y2="{scale.y(high):.1f}" '
        f'stroke="{colour}" stroke-width="1.2"/>'
        for x, low, high in spans
    )


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    unit: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Horizontal bars, one a label, each with its number; ``intervals`` draws whiskers.

    Where a value is not finite there is a gap that says so; a whisker that is not finite is left out.
    """
    row, left = 26, 210
    height = TOP + row * len(values) + 16
    whiskers = {
        name: edges
        for name, edges in (intervals or {}).items()
        if math.isfinite(edges[0]) and math.isfinite(edges[1])
    }
    finite = [value for value in values.values() if math.isfinite(value)]
    most = max([*finite, *(high for _, high in whiskers.values()), 1e-9])
    wide = WIDTH - left - 90
    parts = [f'<text x="8" y="20" class="t">{escape(title)}</text>']
    for number, (name, value) in enumerate(values.items()):
        y = TOP + row * number
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        if not math.isfinite(value):
            parts.append(f'<text x="{left + 6}" y="{y + 15}" class="s">no number</text>')
            continue
        end = length = max(0.0, wide * value / most)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<rect x="{left}" y="{y + 3}" width="{length:.1f}" height="16" rx="2" fill="{colour}"/>'
        )
        if name in whiskers:
            low, high = (left + wide * max(0.0, edge) / most for edge in whiskers[name])
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 11}" y2="{y + 11}" class="w"/>')
            end = max(end, high - left)
        parts.append(f'<text x="{left + end + 6:.1f}" y="{y + 15}">{_number(value)} {escape(unit)}</text>')
    return _svg(parts, title, height)


class _Scale:
    """Numbers to pixels; a flat range is widened so that it can be drawn."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, right: int = RIGHT) -> None:
        self.x0, self.x1 = x0, x1 if x1 > x0 else x0 + 1
        self.y0, self.y1 = y0, y1 if y1 > y0 else y0 + 1
        self.right = WIDTH - right

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.right - LEFT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def panels(rows: Mapping[str, Sequence[Sequence[Sequence[float]]]], *, title: str, most: float) -> str:
    """Square grids of numbers, a row of them a label: dark where a number is high, ``most`` or more darkest.

    Numbers below zero are drawn in another colour. What is nearer to zero than an eighth of ``most`` is left empty.
    """
    side, gap, left = 116, 14, 120
    height = TOP + (side + gap) * len(rows) + 8
    parts = [f'<text x="8" y="20" class="t">{escape(title)}</text>']
    for number, (name, grids) in enumerate(rows.items()):
        top = TOP + number * (side + gap)
        parts.append(f'<text x="{left - 8}" y="{top + side / 2:.0f}" text-anchor="end">{escape(name)}</text>')
        for place, grid in enumerate(grids):
            parts.append(_grid(grid, left + place * (side + gap), top, side, most))
    return _svg(parts, title, height)


def _grid(grid: Sequence[Sequence[float]], x: float, y: float, side: float, most: float) -> str:
    """One square; numbers of one shade that stand side by side are one bar."""
    cell = side / max(1, len(grid))
    bars = [f'<rect x="{x:.0f}" y="{y:.0f}" width="{side:.0f}" height="{side:.0f}" fill="none" class="g"/>']
    for row, numbers in enumerate(grid):
        shades = [max(-8, min(8, round(8 * number / most))) for number in numbers]
        start = 0
        for end in range(1, len(shades) + 1):
            if end < len(shades) and shades[end] == shades[start]:
                continue
            if shade := shades[start]:
                bars.append(
                    f'<rect x="{x + start * cell:.1f}" y="{y + row * cell:.1f}" width="{(end - start) * cell:.1f}" '
                    f'height="{cell:.1f}" fill="{COLOURS[0 if shade > 0 else 1]}" opacity="{abs(shade) / 8:.2f}"/>'
                )
            start = end
    return "".join(bars)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    raw = (high - low) / max(1, count) or 1.0
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(title: str, x: str, y: str, scale: _Scale) -> str:
    parts = [f'<text x="8" y="20" class="t">{escape(title)}</text>']
    for value in ticks(scale.y0, scale.y1):
        at = scale.y(value)
        parts.append(f'<line x1="{LEFT}" x2="{scale.right}" y1="{at:.1f}" y2="{at:.1f}" class="g"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(scale.x0, scale.x1):
        parts.append(
            f'<text x="{scale.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 4}" class="s">{escape(y)}</text>')
    return "".join(parts)


def _right_axis(scale: _Scale) -> str:
    return "".join(
        f'<text x="{scale.right + 6}" y="{scale.y(share) + 4:.1f}" class="s">{100 * share:.0f} %</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


def _key(number: int, name: str, colour: str) -> str:
    y = TOP + 14 + 16 * number
    return (
        f'<rect x="{WIDTH - 190}" y="{y - 8}" width="12" height="4" fill="{colour}"/>'
        f'<text x="{WIDTH - 172}" y="{y - 2}">{escape(name)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1c2733}.t{font-size:14px;font-weight:600}.s{fill:#5b6b7a}"
        ".g{stroke:#d9dee4}.w{stroke:#1c2733;stroke-width:1.5}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff" rx="6"/>{"".join(parts)}</svg>'
    )
