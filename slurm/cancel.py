"""Ends a run for good: forbids requeueing first, asks the ranks to save, then ends what is left.

A cancel and a preemption send the same signals. RUN/.no-requeue is what tells them apart, so it comes first.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.run_record import (
    NO_REQUEUE_NAME,
    array_runs,
    check_is_run,
    job_ids,
    last_owner,
    newest_step,
    planned_save_s,
    script_jobs,
)
from slurm.squeue import Job, cancel_jobs, find_jobs, live_jobs, signal_batch
from training.resilience.owner import this_process, why_ended

_POLL_S = 1.0
_SHORTEST_GRACE_S = 300.0


@dataclass(frozen=True)
class Cancelled:
    """What was done."""

    jobs: tuple[str, ...]
    """That were ended."""
    process: int | None
    """Of this machine, for a run without SLURM."""
    step_before: int
    """Newest checkpoint when the cancel began."""
    step_after: int


def cancel_run(run: Path, *, grace_s: float | None, say: Callable[[str], None] = lambda _: None) -> Cancelled:
    """Ends the run and waits until it has ended.

    Args:
        grace_s: how long a running job may take to save before SLURM ends it; 0 does not ask. None is as long as submit
            has planned for a save, and 300 s at least.
        say: told what is waited for.

    Raises:
        ValueError: no run. RuntimeError: it runs where it cannot be reached from, SLURM does not answer, or it does not
            end.
    """
    check_is_run(run)
    if grace_s is None:
        grace_s = max(_SHORTEST_GRACE_S, planned_save_s(run))
    forbid_requeue(run)
    before = newest_step(run)
    try:
        jobs = live_jobs(job_ids(run))
    except RuntimeError as error:
        raise RuntimeError(
            f"{error} Nothing was ended; {run / NO_REQUEUE_NAME} is in place, so what ends does not start again."
        ) from error
    process = None
    if jobs:
        _end_jobs(run, jobs, grace_s=grace_s, say=say)
    else:
        process = _end_process(run, grace_s=grace_s, say=say)
    return Cancelled(tuple(job.job for job in jobs), process, before, newest_step(run))


def forbid_requeue(run: Path) -> None:
    """Touches .no-requeue; for an array in the runs of its tasks as well."""
    (run / NO_REQUEUE_NAME).touch()
    for task in array_runs(run):
        (task / NO_REQUEUE_NAME).touch()


def _end_jobs(run: Path, jobs: Sequence[Job], *, grace_s: float, say: Callable[[str], None]) -> None:
    submitted = script_jobs(run)
    # Only our own script hands USR1 on to the ranks; of another's the shell might die of it.
    asked = [job.job for job in jobs if job.state == "RUNNING" and job.job.partition("_")[0] in submitted]
    rest = [job.job for job in jobs if job.job not in asked]
    if rest:
        cancel_jobs(rest)
    left = asked
    if asked and grace_s > 0:
        say(f"job {', '.join(asked)} is asked to save, and has {grace_s:.0f} s for it")
        signal_batch(asked, "USR1")
        left = _wait(asked, grace_s)
    if left:
        say(f"job {', '.join(left)} is cancelled")
        cancel_jobs(left)
    still = _wait([job.job for job in jobs], 600.0)
    if still:
        raise RuntimeError(f"job {', '.join(still)} has not ended in 10 minutes: see `squeue -j {','.join(still)}`")


def _wait(jobs: Sequence[str], seconds: float) -> list[str]:
    """Until none of the jobs lives; those that still do."""
    deadline = time.monotonic() + seconds
    while True:
        found = find_jobs(jobs)
        # Where squeue does not answer for a moment nothing is known, and nothing has ended.
        live = list(jobs) if found is None else [job.job for job in found if job.is_live]
        if not live or time.monotonic() >= deadline:
            return live
        time.sleep(_POLL_S)


def _end_process(run: Path, *, grace_s: float, say: Callable[[str], None]) -> int | None:
    """Asks the process that owns the run to save and to end, if it is one of this machine."""
    owner, me = last_owner(run), this_process()
    leases = sorted((run / "leases").glob("[0-9]*.json"))
    released = bool(leases) and leases[-1].with_suffix(".released").exists()
    if owner is None or released or why_ended(owner, me=me) is not None:
        return None
    if (owner.boot, owner.namespace) != (me.boot, me.namespace):
        raise RuntimeError(
            f"the run belongs to {owner.describe()}, which cannot be reached from here. {run / NO_REQUEUE_NAME} "
            "forbids to start it again; call this on that machine, or where SLURM answers."
        )
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except OSError as error:
        raise RuntimeError(
            f"{owner.describe()} cannot be signalled ({error.strerror}): it is another user's."
        ) from error
    say(f"process {owner.pid} is asked to save and to end")
    deadline = time.monotonic() + max(grace_s, 60.0)
    while why_ended(owner, me=me) is None:
        if time.monotonic() >= deadline:
            raise RuntimeError(f"{owner.describe()} has not ended: it may be in an evaluation. Wait, or kill it.")
        time.sleep(_POLL_S / 4)
    return owner.pid
