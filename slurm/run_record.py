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
    return {str(job) for place in _submitted_as(run) for job in read_submission(place).get("job_ids", ())}


def script_log(run: Path, job: str) -> Path:
    """Where the batch script of a job writes, whether it has begun or not."""
    places = [place / "slurm" / f"job-{job}.log" for place in _submitted_as(run)]
    return next((path for path in places if path.exists()), places[0])


def script_logs(run: Path) -> list[Path]:
    """Those of the run's jobs, oldest first; tasks of an array share a directory, which is the array's."""
    own, *array = (place / "slurm" for place in _submitted_as(run))
    # A task whose preflight fails makes no start: its job is known by the file of messages alone.
    jobs = {*job_ids(run), *(path.name.removeprefix("srun.") for path in own.glob("srun.*"))}
    found = {*own.glob("job-*.log"), *(place / f"job-{job}.log" for place in array for job in jobs)}
    return sorted((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime)


def planned_save_s(run: Path) -> float:
    """How long before its end a job of the run is asked to save, as submit has planned it; 0 if nobody has."""
    planned = [read_submission(place).get("signal_before_s") for place in _submitted_as(run)]
    return max((float(seconds) for seconds in planned if isinstance(seconds, int | float)), default=0.0)


def _submitted_as(run: Path) -> list[Path]:
    """The run, and the array that it is a task of."""
    template, dash, _ = run.name.rpartition("-")
    array = run.with_name(template) if dash and template else None
    return [run, *([array] if array is not None and read_submission(array).get("array") else [])]


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
