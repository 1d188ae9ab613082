"""Asks SLURM about jobs and partitions through its own programs, and ends jobs; says so where there is no SLURM."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

WAITING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
"""No process of the job runs, and some will."""
RUNNING_STATES = frozenset(
    {"COMPLETING", "CONFIGURING", "RESIZING", "RUNNING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
_TIMEOUT_S = 30.0
_NO_LIMIT = ("-1", "infinite", "unlimited")
"""As sbatch reads a time; and a time of 0."""
_FIELDS = ("%i", "%T", "%r", "%D", "%N", "%L", "%S")


class Job(NamedTuple):
    """What squeue says about a job, or about one task of an array."""

    job: str
    state: str
    reason: str
    """Why it waits; ``None`` (the word) while it runs."""
    nodes: str
    node_list: str
    time_left: str
    start: str
    """When it started, or is expected to; ``N/A`` where nobody knows."""

    @property
    def is_live(self) -> bool:
        """Whether it runs, or will."""
        return self.state in RUNNING_STATES or self.state in WAITING_STATES


class EndedJob(NamedTuple):
    """What accounting says about a job that squeue has forgotten."""

    job: str
    state: str
    exit_code: str
    end: str


class Partition(NamedTuple):
    """What a partition allows; None where it sets no limit."""

    name: str
    nodes: int
    time_limit_s: int | None


def find_jobs(jobs: Sequence[str]) -> list[Job] | None:
    """Those of the jobs that SLURM knows; None if it cannot be asked."""
    if not jobs:
        return [] if shutil.which("squeue") else None
    answer = _ask(
        "squeue", "--noheader", "--states=all", "--array", f"--jobs={','.join(jobs)}", f"--format={'|'.join(_FIELDS)}"
    )
    if answer is None:
        return None
    rows = (line.split("|") for line in answer.splitlines())
    return [Job(*(cell.strip() for cell in row)) for row in rows if len(row) == len(_FIELDS)]


def live_jobs(jobs: Sequence[str]) -> list[Job]:
    """Those that run or wait; empty also where SLURM is not installed.

    Raises:
        RuntimeError: SLURM does not answer.
    """
    found = find_jobs(jobs)
    if is_silent(found):
        raise RuntimeError(
            f"SLURM does not answer, so whether jobs {', '.join(jobs)} wait or run is not known: try again in a minute."
        )
    return [job for job in found or () if job.is_live]


def is_silent(found: Sequence[Job] | None) -> bool:
    """Whether ``find_jobs`` got no answer from a SLURM that is here: then no job may be taken for gone."""
    return found is None and shutil.which("squeue") is not None


def find_ended_jobs(jobs: Sequence[str]) -> list[EndedJob]:
    """From accounting; empty where a cluster keeps none."""
    if not jobs:
        return []
    answer = _ask(
        *("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(jobs)}"),
        "--format=JobID,State,ExitCode,End",
    )
    rows = (line.split("|") for line in (answer or "").splitlines())
    # "CANCELLED by 1000" is a state as well.
    return [EndedJob(row[0], row[1].partition(" ")[0], row[2], row[3]) for row in rows if len(row) == 4]


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Ends jobs, and takes waiting ones out of the queue.

    Raises:
        RuntimeError: SLURM refuses.
    """
    done = _run("scancel", *jobs)
    if done is None or done.returncode != 0:
        reason = done.stderr.strip() if done is not None else "scancel cannot be run here"
        raise RuntimeError(f"jobs {', '.join(jobs)} could not be cancelled: {reason}")


def signal_batch(jobs: Sequence[str], name: str) -> None:
    """Sends a signal to the batch shells alone, which decide what their ranks are told.

    Raises:
        RuntimeError: SLURM refuses.
    """
    done = _run("scancel", f"--signal={name}", "--batch", *jobs)
    if done is None or done.returncode != 0:
        reason = done.stderr.strip() if done is not None else "scancel cannot be run here"
        raise RuntimeError(f"jobs {', '.join(jobs)} could not be signalled: {reason}")


def find_partition(name: str | None) -> Partition | None:
    """A partition, or the default one; None where SLURM cannot be asked.

    Of a list (``a,b``: whichever can start the job first) the most nodes and the longest time.

    Raises:
        ValueError: there is no such partition.
    """
    answer = _ask("sinfo", "--noheader", "--format=%R|%D|%l|%P", *(["--all"] if name else []))
    if answer is None:
        return None
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
    names = list(dict.fromkeys(row[0] for row in rows))
    default = dict.fromkeys(row[0] for row in rows if row[3].endswith("*"))
    wanted = name.split(",") if name else list(default)[:1]
    for part in wanted:
        if part not in names:
            raise ValueError(f"there is no partition {part} here: pass --partition with one of {', '.join(names)}.")
    if not wanted:
        return None
    parts = [[row for row in rows if row[0] == part] for part in wanted]
    limits = [_limit_s(part[0][2]) for part in parts]
    return Partition(
        ",".join(wanted),
        max(sum(int(row[1]) for row in part) for part in parts),
        None if None in limits else max(limit for limit in limits if limit is not None),
    )


def parse_time_s(text: str) -> int:
    """A time as sbatch reads it: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ValueError: it is none, or none that ends.
    """
    if text.strip().lower() in _NO_LIMIT or re.fullmatch(r"[0:-]*0", text.strip()):
        raise ValueError(
            f"--time {text!r} is unlimited for SLURM, which then never says that it is time to save: pass a limit such "
            "as 24:00:00; the run goes on in the next job."
        )
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise ValueError(
            f"--time {text!r} is no time: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00."
        )
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _limit_s(text: str) -> int | None:
    try:
        return parse_time_s(text)
    except ValueError:  # "infinite", "n/a"
        return None


def _ask(*command: str) -> str | None:
    """What a program prints; empty if it does not know the job, None if it does not answer."""
    done = _run(*command)
    if done is None:
        return None
    if done.returncode != 0:
        return "" if "Invalid job id" in done.stderr else None
    return done.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        return subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
