"""Draws curves over steps in a grid of panels, as an SVG file that needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from training.observability.svg_chart import nice_ticks

PANEL_WIDTH, PANEL_HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 26, 30
_LEGEND, _LEGEND_ROW = 30, 18
_FONT = 'font-family="sans-serif" font-size="11"'


class Curve(NamedTuple):
    """One line; its place in ``values`` is the step, counted from 1."""

    label: str
    color: str
    values: Sequence[float]


class Panel(NamedTuple):
    """One pair of axes. On a logarithmic one, values that are not positive leave a gap."""

    title: str
    curves: Sequence[Curve]
    log: bool = False


def draw(columns: Sequence[Sequence[Panel]], *, legend: Mapping[str, str], axis: str) -> str:
    """An ``<svg>`` of panels side by side and below each other.

    Args:
        legend: label -> colour, written once above all panels.
        axis: what runs from left to right.
    """
    width = PANEL_WIDTH * len(columns)
    entries = list(_place_legend(legend, width))
    top = max((y for _, _, y in entries), default=0) + _LEGEND
    height = top + PANEL_HEIGHT * max(map(len, columns))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(part for label, x, y in entries for part in _draw_entry(label, legend[label], x, y)),
    ]
    for column, panels in enumerate(columns):
        for row, panel in enumerate(panels):
            place = f"translate({column * PANEL_WIDTH} {top + row * PANEL_HEIGHT})"
            parts += [f'<g transform="{place}">', *_draw_panel(panel, axis), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _place_legend(labels: Iterable[str], width: int) -> Iterator[tuple[str, int, int]]:
    """(label, x, y) in rows that fit into the picture."""
    x, y = float(_LEFT), 0
    for label in labels:
        needed = 56 + 6.2 * len(label)
        if x > _LEFT and x + needed > width:
            x, y = float(_LEFT), y + _LEGEND_ROW
        yield label, round(x), y
        x += needed


def _draw_entry(label: str, color: str, x: int, y: int) -> Iterator[str]:
    yield f'<path d="M{x} {y + 15}h22" stroke="{color}" stroke-width="3"/>'
    yield f'<text x="{x + 28}" y="{y + 19}" {_FONT}>{escape(label)}</text>'


def _draw_panel(panel: Panel, axis: str) -> Iterator[str]:
    shown = [value for curve in panel.curves for value in curve.values if _is_shown(value, log=panel.log)] or [1.0]
    low, high = min(shown), max(shown)
    if panel.log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if low == high:
        low, high = low - 1, high + 1
    last = max([len(curve.values) for curve in panel.curves], default=1)

    def x(step: float) -> float:
        return _LEFT + (step - 1) / max(1, last - 1) * (PANEL_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        scaled = math.log10(value) if panel.log else value
        return _TOP + (high - scaled) / (high - low) * (PANEL_HEIGHT - _TOP - _BOTTOM)

    yield f'<text x="{_LEFT}" y="16" {_FONT} font-weight="bold">{escape(panel.title)}</text>'
    for tick in nice_ticks(low, high, most=6):
        value = 10.0**tick if panel.log else tick
        if panel.log and tick != round(tick):
            continue
        label = f"1e{tick:.0f}" if panel.log else f"{value:.3g}"
        yield f'<path d="M{_LEFT} {y(value):.1f}H{PANEL_WIDTH - _RIGHT}" stroke="#dddddd"/>'
        yield f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" {_FONT} text-anchor="end">{label}</text>'
    for step in nice_ticks(1, max(2, last), most=6):
        yield f'<text x="{x(step):.1f}" y="{PANEL_HEIGHT - 12}" {_FONT} text-anchor="middle">{step:.0f}</text>'
    yield f'<text x="{PANEL_WIDTH - _RIGHT}" y="{PANEL_HEIGHT - 1}" {_FONT} text-anchor="end">{escape(axis)}</text>'
    for curve in panel.curves:
        for run in _runs(curve.values, log=panel.log):
            path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in run)
            title = f"<title>{escape(curve.label)}</title>"
            yield f'<path d="M{path}" fill="none" stroke="{curve.color}" stroke-width="1.3">{title}</path>'


def _is_shown(value: float, *, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _runs(values: Sequence[float], *, log: bool) -> Iterator[list[tuple[int, float]]]:
    """Stretches of steps whose values can be drawn."""
    run: list[tuple[int, float]] = []
    for step, value in enumerate(values, start=1):
        if _is_shown(value, log=log):
            run.append((step, value))
        elif run:
            yield run
            run = []
    if run:
        yield run
