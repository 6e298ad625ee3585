"""A line chart as SVG, readable where it stands: axes with round marks, names beside the lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 420, 70, 190, 20, 50
_COLOURS = ("#257", "#c33", "#2a8", "#b70", "#829", "#177", "#a35", "#573", "#359", "#960")


@dataclass(frozen=True, slots=True)
class Line:
    """A named line."""

    name: str
    points: tuple[tuple[float, float], ...]
    """(x, y), by x."""


def line_chart(lines: Sequence[Line], x: str, y: str) -> str:
    """The chart of lines that begin at x = 0 and are never below 0; axes named ``x`` and ``y``."""
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
    for mark in _marks(most_y):
        left, level = at(0.0, mark)
        parts.append(
            f'<line x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}" '
            f'stroke="#ddd"/><text x="{left - 6}" y="{level + 4:.1f}" text-anchor="end">'
            f"{mark:g}</text>"
        )
    for mark in _marks(most_x):
        along, level = at(mark, 0.0)
        parts.append(
            f'<text x="{along:.1f}" y="{level + 18:.1f}" text-anchor="middle">{mark:g}</text>'
        )
    ends: list[float] = []
    for i, line in sorted(enumerate(lines), key=lambda pair: -pair[1].points[-1][1]):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join("{:.1f},{:.1f}".format(*at(*p)) for p in line.points)
        right, level = at(*line.points[-1])
        ends.append(max(level, ends[-1] + 14 if ends else level))  # names do not overlap
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{right + 6:.1f}" y="{ends[-1] + 4:.1f}" fill="{colour}">'
            f"{escape(line.name)}</text>",
        ]
    middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
    parts += [
        f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="{_LEFT}" y="14">{escape(y)}</text>',
    ]
    return "\n".join([*parts, "</svg>\n"])


def _marks(most: float) -> Iterator[float]:
    """Round values from 0 to ``most``, about five."""
    raw = most / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    for i in range(int(most / step) + 1):
        yield i * step
