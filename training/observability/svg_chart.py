"""Draws a line over steps as SVG text, with marks where something happened. Pure; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 18, 26
_MOST_BUCKETS = 500
_LOG_FROM = 100.0
"""Ratio of the greatest to the least value from which on an axis may be logarithmic."""

Point = tuple[float, float]
"""(step, value)."""


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: float
    kind: str
    """CSS class: what colour and shape it has."""
    label: str


def line_chart(
    points: Sequence[Point], *, title: str, marks: Sequence[Mark] = (), dots: bool = False, log: bool = False
) -> str:
    """An ``<svg>``; values that are not finite interrupt the line and are shown as ticks at the top.

    Args:
        dots: show every point (for few of them).
        log: a logarithmic axis, if the values are positive and spread over two orders of magnitude.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    axes = _Axes(points, finite, marks, log=log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="12">{escape(title)}</text>',
        *axes.grid(),
        *_draw_marks(marks, axes),
        *(
            f'<path class="bad" d="M{axes.x(step):.1f} {_TOP}v6"/>'
            for step, value in points
            if not math.isfinite(value)
        ),
        f'<path class="line" d="{_path(points, axes)}"/>',
    ]
    if dots or len(finite) == 1:
        parts += [_dot(step, value, axes) for step, value in finite]
    if not finite:
        parts.append(f'<text class="empty" x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>')
    return "\n".join([*parts, "</svg>"])


class _Axes:
    """From values to places in the picture."""

    def __init__(self, points: Sequence[Point], finite: Sequence[Point], marks: Sequence[Mark], *, log: bool) -> None:
        steps = [step for step, _ in points] + [mark.step for mark in marks]
        values = [value for _, value in finite] or [0.0]
        self._first, self._last = _widen(min(steps, default=0.0), max(steps, default=1.0), by=0.0)
        self._log = log and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
        scaled = [math.log10(value) if self._log else value for value in (min(values), max(values))]
        self._low, self._high = _widen(*scaled, by=0.04)

    def x(self, step: float) -> float:
        return _LEFT + (step - self._first) / (self._last - self._first) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        scaled = math.log10(value) if self._log else value
        return _TOP + (self._high - scaled) / (self._high - self._low) * (HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> Iterator[str]:
        for tick in nice_ticks(self._low, self._high, most=5):
            value = 10**tick if self._log else tick
            y = self.y(value)
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>'
            yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.3g}</text>'
        for step in nice_ticks(self._first, self._last, most=6):
            yield f'<text class="tick" x="{self.x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:,.6g}</text>'


def nice_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers between two values, 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [round(place * distance, 12) for place in range(first, last + 1)]


def thin_out(points: Sequence[Point], *, most: int = _MOST_BUCKETS) -> list[Point]:
    """Least and greatest value of each of ``most`` stretches: fewer points, and no spike is lost."""
    if len(points) <= 2 * most:
        return list(points)
    kept: list[Point] = []
    size = len(points) / most
    for bucket in range(most):
        stretch = points[round(bucket * size) : round((bucket + 1) * size)]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def _widen(low: float, high: float, *, by: float) -> tuple[float, float]:
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low - by * (high - low), high + by * (high - low)


def _path(points: Sequence[Point], axes: _Axes) -> str:
    words = []
    for run in _runs(points):
        places = [f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in thin_out(run)]
        words.append("M" + "L".join(places))
    return "".join(words)


def _runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Stretches of finite values."""
    run: list[Point] = []
    for point in points:
        if math.isfinite(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _draw_marks(marks: Sequence[Mark], axes: _Axes) -> list[str]:
    """At most one of a kind per pixel; the picture stays small however often something happened."""
    drawn = {(round(axes.x(mark.step)), mark.kind): mark for mark in marks}
    line = f"{_TOP}V{HEIGHT - _BOTTOM}"
    return [
        f'<path class="mark {escape(kind)}" d="M{x} {line}"><title>{escape(mark.label)}</title></path>'
        for (x, kind), mark in drawn.items()
    ]


def _dot(step: float, value: float, axes: _Axes) -> str:
    title = f"<title>step {step:,.0f}: {value:.5g}</title>"
    return f'<circle class="dot" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="3">{title}</circle>'
