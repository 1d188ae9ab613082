"""What a run directory tells about its jobs: those that submit.json names, and those that its starts and leases name.

    RUN/submit.json     {"job_ids": ["4711"], "submitted": "2026-01-31T12:00:00+00:00", "nodes": 2, ...}

A run that was started without ``clipyard submit`` has no submit.json and is found by the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.naming import STARTS_FILE
from training.observability.history import read_starts
from training.resilience.owner import Owner

SUBMISSION_NAME = "submit.json"
NO_REQUEUE_NAME = ".no-requeue"
SCRIPT_NAME = "submit.sbatch"
SETTINGS_NAME = "submit.yaml"


def check_is_run(run: Path) -> None:
    """Raises ValueError for a directory that is no run's."""
    marks = (SUBMISSION_NAME, STARTS_FILE, "leases", "config.yaml", "checkpoints", "out.log")
    if not run.is_dir():
        raise ValueError(f"there is no directory {run}: give a run's, --logs joined with --name.")
    if not any((run / mark).exists() for mark in marks):
        raise ValueError(f"{run} is no run: it has none of {', '.join(marks)}. Give --logs joined with --name.")


def read_submission(run: Path) -> dict[str, Any]:
    """submit.json; empty if the run has none, or one that cannot be read."""
    try:
        content = json.loads((run / SUBMISSION_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_submission(run: Path, content: Mapping[str, Any]) -> None:
    """Replaces submit.json as a whole."""
    partial = run / f".{SUBMISSION_NAME}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, run / SUBMISSION_NAME)


def job_ids(run: Path) -> list[str]:
    """Every job of SLURM that the run is known to have had, newest first."""
    found = [str(job) for job in read_submission(run).get("job_ids", ())]
    found += [str(start["job"]) for start in read_starts(run / STARTS_FILE) if start.get("job")]
    owner = last_owner(run)
    if owner is not None and owner.job:
        found.append(owner.job)
    return list(dict.fromkeys(reversed(found)))


def script_jobs(run: Path) -> set[str]:
    """Jobs whose batch script is ours: of the run, or of the array that the run is a task of."""
    records = [read_submission(run)]
    template, dash, _ = run.name.rpartition("-")
    if dash and template:
        records += [record for record in [read_submission(run.with_name(template))] if record.get("array")]
    return {str(job) for record in records for job in record.get("job_ids", ())}


def array_runs(run: Path) -> list[Path]:
    """The runs of the tasks, where the directory was submitted as an array."""
    if not read_submission(run).get("array"):
        return []
    return sorted(path for path in run.parent.glob(f"{run.name}-[0-9]*") if path.is_dir())


def last_owner(run: Path) -> Owner | None:
    """The process that made the newest start; None if there was none, or its lease cannot be read."""
    leases = sorted((run / "leases").glob("[0-9]*.json"))
    try:
        return Owner.from_json(json.loads(leases[-1].read_text())) if leases else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_checkpoint(run: Path) -> Path | None:
    """The step directory with the highest number that has a manifest; whether it is whole is not looked at."""
    steps = [path for path in (run / "checkpoints").glob("step_*") if (path / "MANIFEST.json").is_file()]
    return max(steps, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def newest_step(run: Path) -> int:
    """The step that the run would go on from; 0 without a checkpoint."""
    checkpoint = newest_checkpoint(run)
    return int(checkpoint.name.removeprefix("step_")) if checkpoint is not None else 0
