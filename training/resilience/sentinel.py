"""The file that tells the batch script that a run was stopped by a signal and wants to go on.

    RUN/.requeue.JOB      written by rank 0 after the last save; the script then requeues its job
    RUN/.no-requeue       put there by whoever cancels a run for good; the script then does not

A scheduler that preempts a job and a user who cancels it send the same signals, and exit codes of several tasks are
lost on their way through srun: only files tell the two apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

_PREFIX = ".requeue."


def sentinel_path(root: Path, *, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the sentinel of this job belongs."""
    return root / f"{_PREFIX}{environment.get('SLURM_JOB_ID', 'local')}"


def write_sentinel(root: Path, *, signal_name: str, step: int, environment: Mapping[str, str] = os.environ) -> Path:
    """Says that the run was stopped by a signal and is saved at ``step``. On one rank, after the last save."""
    path = sentinel_path(root, environment=environment)
    record = {"signal": signal_name, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def remove_sentinels(root: Path) -> bool:
    """Forgets how earlier starts of the run ended; returns whether the last was stopped by a signal.

    On one rank, once the run directory is ours.
    """
    found = list(root.glob(f"{_PREFIX}*"))
    for path in found:
        path.unlink(missing_ok=True)
    return bool(found)


def requeue_forbidden(root: Path) -> bool:
    """Whether the run is not to be started again by itself."""
    return (root / ".no-requeue").exists()
