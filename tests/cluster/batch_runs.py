"""Run directories with a rendered batch script, as ``clipyard submit`` leaves them, for a real SLURM.

The trainer is the real one, or a plan: then each start of the job does what its line says, and ends in a moment.

    save 3; exit 1         the checkpoint of step 3 appears; all ranks end with 1
    await                  until a signal comes; then the sentinel is written, and all ranks end with 0
    deaf                   signals do nothing
    first 2                one rank ends with 2, the others take their time
    kill                   one rank is killed with signal 9
    hang 1                 the log says that rank 1 hung; all ranks end with 95
    started                the start is on record in starts.jsonl
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from slurm.batch_script import BatchJob, render
from tests.cluster.cluster import REPOSITORY, Cluster, Job

_PLANNED_TRAINER = """
import json, os, signal, sys, time
from datetime import datetime
from pathlib import Path
from training.resilience.sentinel import write_sentinel

run = Path(os.environ["RUN"])
rank = int(os.environ["SLURM_PROCID"])
start = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
requested = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: requested.append(signal.Signals(number).name))
print(f"start {start} of {PART} on {os.environ['SLURMD_NODENAME']}", *sys.argv[1:], flush=True)
plan = (run / PART).read_text().splitlines()[start]
if "--name" in sys.argv:  # one task of an array
    run = run.with_name(sys.argv[sys.argv.index("--name") + 1])
for line in plan.split(";"):
    act, *arguments = line.split()
    if act == "save" and rank == 0:
        (run / f"checkpoints/step_{int(arguments[0]):08d}").mkdir(parents=True)
    elif act == "started" and rank == 0:
        (run / "starts.jsonl").open("a").write(json.dumps({"step": 0, "job": os.environ["SLURM_JOB_ID"]}) + "\\n")
    elif act == "exit":
        os._exit(int(arguments[0]))
    elif act == "first":
        time.sleep(60 * (rank != 1))
        os._exit(int(arguments[0]))
    elif act == "kill":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    elif act == "hang":
        if rank == 0:
            now = datetime.now().strftime("%Y-%m-%d,%H:%M:%S")
            what = f"hang: rank {arguments[0]} (process 7 on n) has made no progress for 600 s"
            (run / "out.log").open("a").write(f"{now} | CRITICAL | rank {arguments[0]} failed first: {what}\\n")
        time.sleep(0.5)
        os._exit(95)
    elif act == "suspect" and rank == 0:
        from slurm.bad_nodes import record_suspects
        record_suspects(run / "bad_nodes.jsonl", [(os.environ["SLURMD_NODENAME"], "no GPU")])
    elif act in ("await", "deaf"):
        while not requested or act == "deaf":
            time.sleep(0.05)
        if rank == 0:
            write_sentinel(run, signal_name=requested[0], step=7)
"""


def planned_run(directory: Path, name: str, *starts: str, preflight: tuple[str, ...] = (), **fields: Any) -> BatchJob:
    """A run directory whose trainer does as told, start by start."""
    run = directory / name
    (run / "slurm").mkdir(parents=True)
    (run / "plan").write_text("\n".join(starts))
    (run / "preflight").write_text("\n".join(preflight))
    code = run / "code"
    for package in ("training", "training/commands"):
        (code / package).mkdir(parents=True)
        for entry in (REPOSITORY / package).iterdir():
            if entry.name not in ("main.py", "commands", "__pycache__"):
                (code / package / entry.name).symlink_to(entry)
    (code / "slurm").symlink_to(REPOSITORY / "slurm")
    (code / "training/main.py").write_text(f'PART = "plan"\n{_PLANNED_TRAINER}')
    (code / "training/commands/main.py").write_text(f'PART = "preflight"\n{_PLANNED_TRAINER}')
    environment = {"RUN": str(run)}
    return batch_job(run, **{"environment": environment, "preflight": bool(preflight), **fields})


def batch_job(run: Path, **fields: Any) -> BatchJob:
    """A small job; its script is written."""
    values: dict[str, Any] = {
        "name": run.name,
        "run": str(run),
        "nodes": 1,
        "tasks_per_node": 2,
        "cpus_per_task": 1,
        "time_limit": "10",
        "python": sys.executable,
        "crash_delay_s": 8,
        "preflight": False,
    }
    job = BatchJob(**(values | fields))
    (run / "submit.sbatch").write_text(render(job))
    return job


def submit(cluster: Cluster, job: BatchJob, *options: str) -> Job:
    """``sbatch RUN/submit.sbatch``, from anywhere."""
    run = Path(job.run)
    return cluster.submit(run / "submit.sbatch", *options, log=run / "slurm/job-%j.log")


def last_words(job: Job) -> str:
    """The batch script's last line."""
    return next((line for line in reversed(job.log.splitlines()) if f"| job {job.number} |" in line), "")


def rank_log(run: Path, rank: int = 0) -> str:
    """What a rank has said, in all starts."""
    path = run / f"slurm/rank-{rank:05d}.log"
    return path.read_text() if path.exists() else f"no {os.fspath(path)}"
