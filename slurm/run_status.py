"""What has become of a run: read from its directory, and from SLURM where there is one. Only looks."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm.bad_nodes import BAD_NODES_FILE, read_suspects
from slurm.run_record import (
    NO_REQUEUE_NAME,
    array_runs,
    check_is_run,
    job_ids,
    newest_checkpoint,
    read_submission,
    script_log,
    script_logs,
)
from slurm.squeue import RUNNING_STATES, Job, find_ended_jobs, find_jobs, is_silent
from training.naming import STARTS_FILE
from training.observability.history import read_starts
from training.resilience.lease import find_owner

_TAIL_BYTES = 1 << 17
_RECENT_POINTS = 20
_PLAN_LINE = re.compile(r"(\d+) epochs of (\d+) steps; global batch (\d+)")
_DECISION = re.compile(r"\| job \S+ \| (requeued: .*|stop with .*)$", re.MULTILINE)
_FAILED_FIRST = re.compile(r"(rank \d+ failed first: .*)")


@dataclass(frozen=True)
class Start:
    """One start of the run."""

    step: int
    time: str
    job: str | None
    world_size: int | None
    why: str


@dataclass(frozen=True)
class RunStatus:
    """Everything ``clipyard status`` tells."""

    run: str
    state: str
    """array (of runs, none is live), waiting, running, finished, cancelled, stopped, failed, or not started."""
    detail: str
    """Of the state: jobs and nodes, or why the run has ended."""
    step: int
    total_steps: int | None
    samples_per_second: float | None
    step_s: float | None
    remaining_s: float | None
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    checkpoint_gb: float | None
    metrics_age_s: float | None
    starts: Sequence[Start]
    suspects: Sequence[str]
    """Nodes that the next start avoids, with the reason."""


def read_status(run: Path, *, now: datetime) -> RunStatus:
    """The state of a run.

    Raises:
        ValueError: the directory is no run's.
    """
    check_is_run(run)
    points = _last_points(run)
    step = int(points[-1]["step"]) + 1 if points else 0
    total = _total_steps(run)
    step_s = statistics.median(float(point["train/batch_time"]) for point in points) if points else None
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        step = max(step, int(checkpoint.name.removeprefix("step_")))
    state, detail = _state(run, step=step, total=total)
    return RunStatus(
        run=str(run),
        state=state,
        detail=detail,
        step=step,
        total_steps=total,
        samples_per_second=float(points[-1]["train/samples_per_second"]) if points else None,
        step_s=step_s,
        remaining_s=(total - step) * step_s if total is not None and step_s is not None else None,
        checkpoint_step=int(checkpoint.name.removeprefix("step_")) if checkpoint else None,
        checkpoint_age_s=_age_s(checkpoint / "MANIFEST.json", now) if checkpoint else None,
        checkpoint_gb=sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e9 if checkpoint else None,
        metrics_age_s=_age_s(run / "metrics.jsonl", now),
        starts=_starts(run),
        suspects=[f"{suspect.node} ({suspect.reason})" for suspect in read_suspects(run / BAD_NODES_FILE, now=now)],
    )


def render_status(status: RunStatus) -> str:
    """The page that is printed."""
    rows = [("run", status.run), ("state", f"{status.state}{f': {status.detail}' if status.detail else ''}")]
    rows.append(("step", _step_line(status)))
    if status.samples_per_second is not None:
        age = f", {_duration(status.metrics_age_s)} ago" if status.metrics_age_s is not None else ""
        rows.append(("speed", f"{status.samples_per_second:,.1f} samples/s, {status.step_s:.3g} s a step{age}"))
    if status.checkpoint_step is None:
        rows.append(("checkpoint", "none yet"))
    else:
        rows.append(
            (
                "checkpoint",
                f"step {status.checkpoint_step:,}, {_duration(status.checkpoint_age_s)} ago, "
                f"{status.checkpoint_gb:.3g} GB",
            )
        )
    rows.append(("starts", _starts_line(status.starts)))
    rows += [("", _start_line(start)) for start in status.starts[-5:]]
    rows += [("suspected", suspect) for suspect in status.suspects]
    return "".join(f"{topic:<12}{text}\n" for topic, text in rows)


def _state(run: Path, *, step: int, total: int | None) -> tuple[str, str]:
    ids = job_ids(run)
    jobs = find_jobs(ids)
    live = [job for job in jobs or () if job.is_live]
    if live:
        running = [job for job in live if job.state in RUNNING_STATES]
        return ("running" if running else "waiting"), "; ".join(_describe(job) for job in live)
    state, detail = _state_without_jobs(run, ids=ids, jobs=jobs, step=step, total=total)
    if ids and is_silent(jobs):
        unknown = "SLURM does not answer, so whether a job waits or runs is not known"
        detail = f"{unknown}; {detail}" if detail else unknown
    return state, detail


def _state_without_jobs(
    run: Path, *, ids: Sequence[str], jobs: Sequence[Job] | None, step: int, total: int | None
) -> tuple[str, str]:
    if tasks := array_runs(run):
        return "array", f"its runs are {', '.join(task.name for task in tasks)}, each with a status of its own"
    try:
        owner = find_owner(run / "leases")
    except OSError as error:
        owner = f"nobody knows (its leases cannot be read: {error.strerror})"
    if owner is not None:
        return "running", owner if jobs is not None or not ids else f"{owner}, as far as can be seen without SLURM"
    if (run / NO_REQUEUE_NAME).exists():
        return "cancelled", "`clipyard submit` starts it again"
    if total is not None and step >= total:
        return "finished", ""
    sentinel = next(iter(sorted(run.glob(".requeue.*"))), None)
    if sentinel is not None:
        return "stopped", f"by {_signal_of(sentinel)}, and saved; nobody has put it back into the queue"
    if not read_starts(run / STARTS_FILE):
        return "not started", _ended(ids)
    return "failed", "; ".join(part for part in (_last_decision(run), _first_failure(run), _ended(ids)) if part)


def _describe(job: Job) -> str:
    if job.state in RUNNING_STATES:
        return f"job {job.job} is {job.state} on {job.node_list}, {job.time_left} left"
    start = "" if job.start in ("N/A", "") else f", expected to start {job.start}"
    return f"job {job.job} is {job.state} ({job.reason}){start}"


def _ended(ids: Sequence[str]) -> str:
    ended = find_ended_jobs(ids[:1])
    return f"job {ended[-1].job} ended as {ended[-1].state}, exit code {ended[-1].exit_code}" if ended else ""


def _signal_of(sentinel: Path) -> str:
    try:
        return str(json.loads(sentinel.read_text())["signal"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a signal"


def _last_points(run: Path) -> list[dict[str, Any]]:
    """The newest lines of metrics.jsonl that report training."""
    points = []
    for line in _tail(run / "metrics.jsonl").splitlines():
        try:
            point = json.loads(line)
        except ValueError:  # cut by the tail, by a crash, or just being written
            continue
        if isinstance(point, dict) and {"step", "train/batch_time", "train/samples_per_second"} <= point.keys():
            points.append(point)
    return points[-_RECENT_POINTS:]


def _total_steps(run: Path) -> int | None:
    """As the trainer has logged it; before that as it was planned."""
    logged = _PLAN_LINE.findall(_head_and_tail(run / "out.log"))
    if logged:
        return int(logged[-1][0]) * int(logged[-1][1])
    planned = read_submission(run).get("steps")
    return planned if isinstance(planned, int) else None


def _starts(run: Path) -> list[Start]:
    requeues = {job: _requeues(run, job) for job in job_ids(run)}
    starts: list[Start] = []
    for record in read_starts(run / STARTS_FILE):
        job = record.get("job")
        previous = starts[-1] if starts else None
        starts.append(
            Start(
                step=int(record["step"]),
                time=str(record.get("time", "")),
                job=str(job) if job else None,
                world_size=record.get("world_size"),
                why=_why(record, previous, requeues.get(str(job), [])),
            )
        )
    return starts


def _why(record: Mapping[str, Any], previous: Start | None, requeues: Sequence[str]) -> str:
    """Why a start was made, as the batch script wrote it down, else as the trainer saw it."""
    restart = int(record.get("restart") or 0)
    job = record.get("job")
    if previous is None:
        return "first start"
    if job and str(job) == previous.job:
        if 0 < restart <= len(requeues):
            return requeues[restart - 1]
        return "stopped by a signal" if record.get("after_signal") else "put back by SLURM (node lost), or crashed"
    ended = "was stopped by a signal" if record.get("after_signal") else "ended without a word"
    what = f"job {previous.job}" if previous.job else "a start"
    return f"{'submitted' if job else 'started'} again, after {what} that {ended}"


def _requeues(run: Path, job: str) -> list[str]:
    """The reasons in the batch script's log, one for each requeue."""
    text = _tail(script_log(run, job), limit=1 << 22)
    return [line.removeprefix("requeued: ") for line in _DECISION.findall(text) if line.startswith("requeued: ")]


def _last_decision(run: Path) -> str:
    logs = script_logs(run)
    found = _DECISION.findall(_tail(logs[-1])) if logs else []
    return str(found[-1]) if found else ""


def _first_failure(run: Path) -> str:
    found = _FAILED_FIRST.findall(_tail(run / "out.log"))
    return str(found[-1]) if found else ""


def _tail(path: Path, *, limit: int = _TAIL_BYTES) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _head_and_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    return head + _tail(path)


def _age_s(path: Path, now: datetime) -> float | None:
    try:
        return max(0.0, now.timestamp() - path.stat().st_mtime)
    except OSError:
        return None


def _step_line(status: RunStatus) -> str:
    if status.total_steps is None:
        return f"{status.step:,} of a number that is not known yet"
    line = f"{status.step:,} of {status.total_steps:,} ({100 * status.step / max(1, status.total_steps):.1f} %)"
    if status.remaining_s is not None and status.step < status.total_steps:
        line += f", {_duration(status.remaining_s)} of training left"
    return line


def _starts_line(starts: Sequence[Start]) -> str:
    if not starts:
        return "none yet"
    jobs = Counter(start.job for start in starts if start.job)
    restarts = len(starts) - 1
    plural = "" if restarts == 1 else "s"
    return f"{len(starts)} ({restarts} restart{plural}{f', in {len(jobs)} jobs' if len(jobs) > 1 else ''})"


def _start_line(start: Start) -> str:
    ranks = f", {start.world_size} ranks" if start.world_size else ""
    job = f", job {start.job}" if start.job else ""
    return f"{start.time} at step {start.step:,}{job}{ranks}: {start.why}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
