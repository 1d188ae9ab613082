"""Writes one page about a run: its curves with what happened on them, its starts, events and checkpoints.

The page needs nothing but itself: styles and pictures (SVG) are in it, and there is no script.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from training.observability.stragglers import SLOW_SCORE
from training.observability.svg_chart import Mark, Point, line_chart

_CURVES: Sequence[tuple[str, str, bool]] = (
    ("train/loss", "Loss", False),
    ("train/grad_norm", "Gradient norm", True),
    ("train/lr", "Learning rate", False),
    ("train/logit_scale", "Logit scale", False),
    ("train/samples_per_second", "Samples per second, all ranks", False),
    ("train/data_wait_pct", "Waiting for data, % of the time", False),
    ("train/compute/seconds_mean", "Own computing per step, s, mean over ranks", False),
    ("train/straggler/score", "The slowest rank: the others' own time / its own", False),
)
"""(metric, title, logarithmic where it helps)."""
_MARK_OF_EVENT = {
    "skipped": "skip",
    "overflow": "skip",
    "damp": "damp",
    "undamp": "damp",
    "rewind": "rewind",
    "rewound": "rewind",
    "stop": "stop",
    "stopped": "stop",
    "replicas differ": "stop",
}
"""Others are of the kind ``event``."""
_LEGEND = {
    "start": "start",
    "change": "start with changes",
    "skip": "skipped step",
    "damp": "damped",
    "rewind": "rewind",
    "stop": "stop or damage",
    "event": "other event",
}
_ROUTINE_EVENTS = frozenset({"resumed"})
_SHOWN_EVENTS = 200
_SHOWN_RANKS = 16
_FACTS = frozenset({"step", "time", "event"})


@dataclass(frozen=True)
class SavedStep:
    """A step checkpoint on the disk."""

    step: int
    num_bytes: int
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """Everything a run has written down about itself, in the order in which it did."""

    name: str
    metrics: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl."""
    events: Sequence[Mapping[str, Any]] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[SavedStep] = ()
    settings: str = ""
    """config.yaml."""


@dataclass
class _Page:
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, *content: str) -> None:
        self.parts.append(f"<section><h2>{escape(title)}</h2>\n" + "\n".join(content) + "</section>")


def render_report(record: RunRecord) -> str:
    """The page as HTML."""
    marks = [*_start_marks(record.starts), *_event_marks(record.events)]
    page = _Page()
    page.section("Training", _legend(marks), _grid(_training_curves(record.metrics, marks)))
    evaluations = _evaluation_curves(record.metrics, marks)
    if evaluations:
        page.section("Evaluation", _grid(evaluations))
    if ranks := _ranks_table(record):
        page.section("Ranks that the others waited for", ranks)
    page.section(f"Starts ({len(record.starts)})", _starts_table(record.starts))
    page.section(f"Events ({len(record.events)})", _events_summary(record.events), _events_table(record.events))
    page.section(f"Checkpoints ({len(record.checkpoints)})", _checkpoints_table(record.checkpoints))
    if record.settings:
        page.section(
            "Settings", f"<details><summary>config.yaml</summary><pre>{escape(record.settings)}</pre></details>"
        )
    name = escape(record.name)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        f"<h1>{name}</h1>\n{_summary(record)}\n" + "\n".join(page.parts) + "\n</body></html>\n"
    )


def given_up(events: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each event whether it belongs to a past that a later start did not go on from."""
    gone = [False] * len(events)
    for place, event in enumerate(events):
        if event.get("event") == "resumed":
            for earlier in range(place):
                gone[earlier] = gone[earlier] or _step(events[earlier]) >= _step(event)
    return gone


def _summary(record: RunRecord) -> str:
    steps = [line for line in record.metrics if "train/loss" in line]
    last = steps[-1] if steps else {}
    tiles = {
        "last step logged": _number(last.get("step")),
        "epochs": _number(last.get("train/epoch")),
        "samples seen": _number(last.get("train/samples_seen")),
        "loss": _number(last.get("train/loss")),
        "samples/s (median)": _number(_median(_values(steps, "train/samples_per_second"))),
        "starts": str(len(record.starts)),
        "skipped steps": str(sum(event.get("event") == "skipped" for event in record.events)),
    }
    cells = "".join(f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f'<div class="tiles">{cells}</div>'


def _training_curves(metrics: Sequence[Mapping[str, Any]], marks: Sequence[Mark]) -> list[str]:
    return [
        line_chart(_series(metrics, name), title=title, marks=marks, log=log)
        for name, title, log in _CURVES
        if any(name in line for line in metrics)
    ] or [line_chart([], title="Loss", marks=marks)]


def _evaluation_curves(metrics: Sequence[Mapping[str, Any]], marks: Sequence[Mark]) -> list[str]:
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("val/"))
    of_starts = [mark for mark in marks if mark.kind in ("start", "change")]
    return [
        line_chart(series, title=name.removeprefix("val/"), marks=of_starts, dots=True)
        for name in names
        if (series := _series(metrics, name)) and name != "val/num_samples"
    ]


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [(float(line["step"]), float(line[name])) for line in metrics if isinstance(line.get(name), int | float)]


def _start_marks(starts: Sequence[Mapping[str, Any]]) -> list[Mark]:
    marks = []
    for number, start in enumerate(starts[1:], start=2):
        changed = "; ".join(_change_lines(start))
        label = f"start {number}, step {_step(start)}" + (f": {changed}" if changed else "")
        marks.append(Mark(_step(start), "change" if changed else "start", label))
    return marks


def _event_marks(events: Sequence[Mapping[str, Any]]) -> list[Mark]:
    return [
        Mark(_step(event), _kind(event) + (" gone" if gone else ""), f"{event.get('event')}, step {_step(event)}")
        for event, gone in zip(events, given_up(events), strict=True)
        if event.get("event") not in _ROUTINE_EVENTS
    ]


def _kind(event: Mapping[str, Any]) -> str:
    return _MARK_OF_EVENT.get(str(event.get("event")), "event")


def _legend(marks: Sequence[Mark]) -> str:
    kinds = {mark.kind.split()[0] for mark in marks}
    entries = [
        f'<span><svg viewBox="0 0 10 14"><path class="mark {kind}" d="M5 0V14"/></svg>{meaning}</span>'
        for kind, meaning in _LEGEND.items()
        if kind in kinds
    ]
    return f'<p class="legend"><span>All curves are over steps. Marked:</span>{"".join(entries)}</p>' if entries else ""


def _ranks_table(record: RunRecord) -> str:
    """Who was the last at how many log points, and by how much; the host is known of ranks that were named."""
    points: dict[int, list[Mapping[str, Any]]] = {}
    for line in record.metrics:
        if isinstance(line.get("train/straggler/rank"), int | float):
            points.setdefault(int(line["train/straggler/rank"]), []).append(line)
    total = sum(map(len, points.values()))
    hosts = {event.get("rank"): event.get("host") for event in record.events if event.get("event") == "straggler"}
    rows = []
    for rank, lines in sorted(points.items(), key=lambda entry: -len(entry[1]))[:_SHOWN_RANKS]:
        compute_s, data_s, others_s = (
            _median(_values(lines, f"train/straggler/{name}_seconds")) for name in ("compute", "data_wait", "others")
        )
        slow = sum(score < SLOW_SCORE for score in _values(lines, "train/straggler/score"))
        often = f"{len(lines)} ({len(lines) / total:.0%})"
        cells = (rank, hosts.get(rank, ""), often, slow, _number(compute_s), _number(data_s), _number(others_s))
        rows.append([escape(str(cell)) for cell in cells])
    titles = ("rank", "host", "last at log points", f"of them score < {SLOW_SCORE:g}", "compute s", "data wait s")
    return _table((*map(escape, titles), "the others s"), rows) if rows else ""


def _starts_table(starts: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for number, start in enumerate(starts, start=1):
        job = start.get("job")
        place = " ".join(filter(None, (str(start.get("host") or ""), f"job {job}" if job else "")))
        batch = [int(start.get(name, 1)) for name in ("world_size", "batch_size", "accum_freq")]
        product = " x ".join(map(str, batch))
        origin = str(start.get("resumed_from") or "the beginning").rstrip("/").rpartition("/")[2]
        if start.get("parent"):
            origin = f"{start['parent'].get('run')} at step {start['parent'].get('step')}"
        changes = "<br>".join(map(escape, _change_lines(start)))
        cells = (number, _number(_step(start)), start.get("time", ""), place, f"{math.prod(batch)} = {product}", origin)
        rows.append([*(escape(str(cell)) for cell in cells), changes])
    return _table(("", "from step", "time", "where", "global batch", "goes on from", "changed"), rows)


def _change_lines(start: Mapping[str, Any]) -> list[str]:
    changes = start.get("changes") or {}
    lines = [f"{name}: {_short(saved)} -> {_short(now)}" for name, (saved, now) in changes.items()]
    new = start.get("new_data")
    if new:
        lines.append(f"new data from epoch {new.get('first_epoch')}; about {new.get('unread_samples')} samples unread")
    return lines


def _events_summary(events: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(event.get("event")) for event in events)
    return "<p>" + escape(", ".join(f"{count} {name}" for name, count in counts.most_common()) or "None.") + "</p>"


def _events_table(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event, gone in list(zip(events, given_up(events), strict=True))[-_SHOWN_EVENTS:]:
        details = ", ".join(f"{name}: {_short(value)}" for name, value in event.items() if name not in _FACTS)
        name = f"{event.get('event')}{' (a past that was given up)' if gone else ''}"
        rows.append([escape(str(cell)) for cell in (_number(_step(event)), event.get("time", ""), name, details)])
    hidden = len(events) - len(rows)
    note = f"<p>The last {len(rows)}; {hidden} earlier ones are in events.jsonl.</p>" if hidden else ""
    return note + _table(("step", "time", "event", "details"), rows)


def _checkpoints_table(checkpoints: Sequence[SavedStep]) -> str:
    rows = [
        [escape(str(cell)) for cell in (_number(saved.step), f"{saved.num_bytes / 1e6:,.1f}", ", ".join(saved.tags))]
        for saved in checkpoints
    ]
    return _table(("step", "MB", "tags"), rows) if rows else "<p>None.</p>"


def _grid(charts: Iterable[str]) -> str:
    return '<div class="charts">' + "\n".join(f"<figure>{chart}</figure>" for chart in charts) + "</div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """``rows`` are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _step(line: Mapping[str, Any]) -> int:
    return int(line.get("step", 0))


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for _, value in _series(lines, name) if math.isfinite(value)]


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,}" if isinstance(value, int) or float(value).is_integer() else f"{value:,.4g}"


def _short(value: Any, *, longest: int = 160) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #6a737d; --line: #0b5cad; --grid: #e3e6ea; --paper: #fff;
  --card: #f6f8fa; --skip: #b7791f; --damp: #00857a; --rewind: #8250df; --stop: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #8b949e; --line: #6cb6ff; --grid: #30363d;
  --paper: #0d1117; --card: #161b22; --skip: #e3b341; --damp: #39c5bb; --rewind: #bc8cff; --stop: #ff7b72; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1240px;
  margin: 24px auto; padding: 0 16px; }
h1 { font-size: 22px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin: 28px 0 8px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tiles div { background: var(--card); border-radius: 6px; padding: 8px 14px; }
.tiles b { display: block; font-size: 18px; } .tiles span { color: var(--quiet); font-size: 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 12px; }
figure { margin: 0; background: var(--card); border-radius: 6px; padding: 6px; }
figure svg { width: 100%; height: auto; display: block; }
.title { font: 600 12px system-ui, sans-serif; fill: var(--ink); }
.tick, .empty { font: 10px system-ui, sans-serif; fill: var(--quiet); } .empty { text-anchor: middle; }
.grid { stroke: var(--grid); fill: none; } .line { stroke: var(--line); stroke-width: 1.4; fill: none; }
.dot { fill: var(--line); } .bad { stroke: var(--stop); stroke-width: 2; }
.mark { stroke-width: 1.4; fill: none; stroke: var(--quiet); }
.mark.start { stroke-dasharray: 2 3; } .mark.change { stroke-dasharray: 7 3; }
.mark.skip { stroke: var(--skip); stroke-dasharray: 1 2; } .mark.damp { stroke: var(--damp); stroke-dasharray: 4 2; }
.mark.rewind { stroke: var(--rewind); stroke-width: 2; } .mark.stop { stroke: var(--stop); stroke-width: 2.4; }
.mark.gone { opacity: .3; }
.legend span { margin-right: 18px; color: var(--quiet); } .legend svg { width: 10px; height: 14px; margin-right: 5px;
  vertical-align: -2px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; } pre { font-size: 12px; overflow-x: auto; }
"""
