"""A line chart as SVG, with round values at the axes and names beside the lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 70, 190, 20, 50
_NAME_HEIGHT = 14
_COLOURS = ("#257", "#c33", "#2a8", "#b70", "#829", "#177", "#a35", "#573", "#359", "#960")


@dataclass(frozen=True, slots=True)
class Line:
    """A named line."""

    name: str
    points: tuple[tuple[float, float], ...]
    """Points (x, y) in the order of x."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A named position on the x axis."""

    name: str
    x: float


def line_chart(
    lines: Sequence[Line],
    x: str,
    y: str,
    *,
    bands: Sequence[tuple[float, float]] = (),
    marks: Sequence[Mark] = (),
) -> str:
    """Draw lines with x and y values of at least 0; ``x`` and ``y`` name the axes.

    ``bands`` are shaded ranges of x; ``marks`` are drawn as vertical lines.
    """
    most_x = max((p[0] for line in lines for p in line.points), default=1.0) or 1.0
    most_y = 1.05 * (max((p[1] for line in lines for p in line.points), default=1.0) or 1.0)

    def at(px: float, py: float) -> tuple[float, float]:
        across = (_WIDTH - _LEFT - _RIGHT) * px / most_x
        up = (_HEIGHT - _TOP - _BOTTOM) * py / most_y
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for begin, end in bands:
        left, right = at(begin, 0.0)[0], at(end, 0.0)[0]
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP}" width="{max(right - left, 1.0):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}" fill="#ffe3b8"/>'
        )
    for level in _rounds(most_y):
        left, level_y = at(0.0, level)
        parts.append(
            f'<line x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{level_y:.1f}" y2="{level_y:.1f}" '
            f'stroke="#ddd"/><text x="{left - 6}" y="{level_y + 4:.1f}" text-anchor="end">'
            f"{level:g}</text>"
        )
    for along in _rounds(most_x):
        along_x, floor = at(along, 0.0)
        parts.append(
            f'<text x="{along_x:.1f}" y="{floor + 18:.1f}" text-anchor="middle">{along:g}</text>'
        )
    for mark in marks:
        along_x, floor = at(mark.x, 0.0)
        parts.append(
            f'<line x1="{along_x:.1f}" x2="{along_x:.1f}" y1="{_TOP}" y2="{floor:.1f}" '
            f'stroke="#888" stroke-dasharray="4 4"/><text x="{along_x + 4:.1f}" '
            f'y="{floor - 6:.1f}" fill="#555">{escape(mark.name)}</text>'
        )
    by_end = sorted(enumerate(lines), key=lambda pair: -pair[1].points[-1][1])
    names_y = _apart([at(*line.points[-1])[1] for _, line in by_end])
    for (i, line), name_y in zip(by_end, names_y, strict=True):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join("{:.1f},{:.1f}".format(*at(*p)) for p in line.points)
        right = at(*line.points[-1])[0]
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{right + 6:.1f}" y="{name_y + 4:.1f}" fill="{colour}">'
            f"{escape(line.name)}</text>",
        ]
    middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
    parts += [
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="{_LEFT}" y="14">{escape(y)}</text>',
    ]
    return "\n".join([*parts, "</svg>\n"])


def _apart(levels: Sequence[float]) -> list[float]:
    """Return heights from top to bottom, moved just enough that names do not overlap."""
    found: list[float] = []
    for level in levels:
        found.append(max(level, found[-1] + _NAME_HEIGHT if found else level))
    floor = _HEIGHT - _NAME_HEIGHT / 2
    for i in reversed(range(len(found))):
        found[i] = min(found[i], floor)
        floor = found[i] - _NAME_HEIGHT
    return found


def _rounds(most: float) -> Iterator[float]:
    """Yield about five round values from 0 to ``most``."""
    raw = most / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    for i in range(int(most / step) + 1):
        yield i * step
