"""What becomes of a job when a start ends: every row of the table in docs/requeue.md, on a real SLURM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from tests.cluster.batch_runs import planned_run, submit
from tests.cluster.cluster import Cluster, Job


class Ending(NamedTuple):
    """How a job ends, and what its log says on the way."""

    starts: tuple[str, ...]
    restarts: int
    code: int
    says: tuple[str, ...]


ENDINGS = {
    "done": Ending(("exit 0",), 0, 0, ("done",)),
    "refused": Ending(("first 2",), 0, 2, ("the configuration is refused",)),
    "pointless": Ending(("exit 93",), 0, 93, ("starting again would end the same way",)),
    "bad-data": Ending(("first 94",), 0, 94, ("too much of the data cannot be used",)),
    "crash-loop": Ending(
        ("save 1; exit 1", "kill", "save 2; exit 1", "exit 1", "exit 3", "exit 1"),
        *(5, 93),
        (
            "crash with code 1, after progress from none to step_00000001",
            "crash with code 137, without progress, 1 in a row",
            "crash with code 1, after progress from step_00000001 to step_00000002",
            r"crash with code 1, without progress, 1 in a row\.",
            r"crash with code 3, without progress, 2 in a row\.\n.*the next start is in 3 s",
            "stop with 93: crash with code 1, without progress, 3 in a row",
        ),
    ),
    "trained-before": Ending(
        ("started; save 1; exit 1", "exit 2", "exit 0"), 2, 0, ("crash with code 2, without progress, 1 in a row",)
    ),
}


def test_the_end_of_a_start_decides_what_follows(cluster: Cluster, tmp_path: Path) -> None:
    jobs = {name: submit(cluster, planned_run(tmp_path, name, *case.starts)) for name, case in ENDINGS.items()}
    for name, case in ENDINGS.items():
        job = jobs[name]
        job.wait_for_end()
        assert (job.exit_code(), job.restarts()) == (case.code, case.restarts), job.describe()
        for pattern in case.says:
            assert re.search(pattern, job.log), f"{pattern}\n{job.log}"


def _asked_and_stopped(cluster: Cluster, tmp_path: Path, name: str) -> Job:
    job = submit(cluster, planned_run(tmp_path, name, "await", "exit 0"))
    job.wait_for_text("start 0", tmp_path / name / "slurm/rank-00000.log")
    return job


def test_a_signal_requeues_and_a_cancel_does_not(cluster: Cluster, tmp_path: Path) -> None:
    names = ("asked", "cancelled", "forbidden", "told-ranks")
    asked, cancelled, forbidden, told_ranks = (_asked_and_stopped(cluster, tmp_path, name) for name in names)
    asked.signal("USR1")
    told_ranks.signal("TERM", batch_only=False)  # a preemption without a signal for the script
    (tmp_path / "forbidden/.no-requeue").touch()
    forbidden.signal("USR1")
    cancelled.cancel()
    for job, restarts, state in (
        (asked, 1, "COMPLETED"),
        (told_ranks, 1, "COMPLETED"),
        (forbidden, 0, "COMPLETED"),
        (cancelled, 0, "CANCELLED"),
    ):
        assert (job.wait_for_end(), job.restarts()) == (state, restarts), job.describe()
    assert 'stopped by a signal, and saved: {"signal": "SIGUSR1", "step": 7' in asked.log
    assert "forbids to go on. Not requeued" in forbidden.log
    assert "stop with 0: the job was cancelled" in cancelled.log
