"""What becomes of a job when a start ends: every row of the table in docs/requeue.md, on a real SLURM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from slurm.bad_nodes import read_suspects
from tests.cluster.batch_runs import planned_run, rank_log, submit
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
            r"crash with code (137|143), without progress, 1 in a row",
            "crash with code 1, after progress from step_00000001 to step_00000002",
            r"crash with code 1, without progress, 1 in a row\.",
            r"(?s)crash with code 3, without progress, 2 in a row\..*the next start is in 8 s",
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
    job = submit(cluster, planned_run(tmp_path, name, "await", "exit 0", partition="low"))
    job.wait_for_text("start 0", tmp_path / name / "slurm/rank-00000.log")
    return job


def test_a_signal_requeues_and_a_cancel_does_not(cluster: Cluster, tmp_path: Path) -> None:
    names = ("asked", "cancelled", "forbidden", "told-ranks")
    # Where SLURM may preempt a job, it says more about it.
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


def test_a_run_that_saves_nothing_new_is_not_put_back_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, planned_run(tmp_path, "never", "save 7; await", "await", "await", "await", partition="low"))
    for number in range(4):
        job.wait_for_text(f"start {number} of plan", tmp_path / "never/slurm/rank-00000.log")
        job.signal("USR1")
    assert (job.wait_for_end(), job.exit_code(), job.restarts()) == ("FAILED", 93, 3), job.describe()
    assert "stop with 93: three time limits in a row without a checkpoint" in job.log


def _nodes_of_starts(run: Path) -> list[str]:
    return re.findall(r"^start \d+ of plan on (\S+)", rank_log(run), re.MULTILINE)


def test_the_next_start_does_without_a_suspected_node(cluster: Cluster, tmp_path: Path) -> None:
    hung = submit(cluster, planned_run(tmp_path, "hung", "hang 1", "exit 0"))
    looked_at = planned_run(tmp_path, "looked-at", "exit 9", "exit 0", preflight=("suspect; exit 95", "exit 1"))
    refused = submit(cluster, looked_at)
    for job in (hung, refused):
        assert (job.wait_for_end(), job.restarts()) == ("COMPLETED", 1), job.describe()
        (suspect,) = read_suspects(job.log_path.parent.parent / "bad_nodes.jsonl")
        assert f"excluded from the next start: {suspect.node}." in job.log
        assert _nodes_of_starts(job.log_path.parent.parent)[-1] != suspect.node
    assert len(_nodes_of_starts(tmp_path / "hung")) == 2
    assert _nodes_of_starts(tmp_path / "looked-at")[0] != suspect.node, "no training where the preflight finds fault"
    assert "crash with code 95, suspected: " in hung.log
    assert "the preflight suspects" in refused.log
    assert "preflight ended with 1 after" in refused.log
    assert "training all the same" in refused.log


def test_no_node_is_left_out_that_the_job_cannot_do_without(cluster: Cluster, tmp_path: Path) -> None:
    nodes = len(cluster.nodes())
    job = submit(cluster, planned_run(tmp_path, "all", "save 1; hang 1", "exit 0", nodes=nodes, tasks_per_node=1))
    assert (job.wait_for_end(), job.restarts()) == ("COMPLETED", 1), job.describe()
    assert "suspected (hang: rank 1" in job.log
    assert "but too few other nodes are up" in job.log
    assert "excluded" not in job.log


def test_a_job_that_cannot_save_before_its_limit_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Two honest minutes, whose signals SLURM sends. Beside them: the limit on restarts, and an array of two runs."""
    late = submit(cluster, planned_run(tmp_path, "late", "deaf", "await", "exit 0", time_limit="1", signal_before_s=10))
    often = submit(cluster, planned_run(tmp_path, "often", "save 1; exit 1", "save 2; exit 1", max_restarts=1))
    array = planned_run(tmp_path, "array", "save 1; exit 1", "save 2; exit 0", array="0-1")
    whole = submit(cluster, array)
    assert (often.wait_for_end(), often.exit_code(), often.restarts()) == ("FAILED", 93, 1), often.describe()
    assert "restarted 1 times at most" in often.log
    for task in (0, 1):
        run = tmp_path / f"array-{task}"
        job = cluster.job(f"{whole.number}_{task}", log=whole.log_path)
        assert (job.wait_for_end(), job.restarts()) == ("COMPLETED", 1), job.describe()
        assert f"start 1 of plan on {_nodes_of_starts(run)[1]} --config" in rank_log(run)
        assert f"--name array-{task} --seed {task}" in rank_log(run)
    assert (late.wait_for_end(timeout_s=300), late.restarts()) == ("COMPLETED", 2), late.describe()
    assert "TERM: SLURM ends the job, which is at its time limit." in late.log
    assert "requeued: stopped by a signal, and saved" in late.log


def test_a_preempted_job_goes_on_whether_it_had_time_to_save_or_not(cluster: Cluster, tmp_path: Path) -> None:
    saves, deaf = (
        submit(cluster, planned_run(tmp_path, name, act, "exit 0", partition="low"))
        for name, act in (("saves", "await"), ("deaf", "deaf"))
    )
    for name in ("saves", "deaf"):
        saves.wait_for_text("start 0", tmp_path / name / "slurm/rank-00000.log")
    nodes = len(cluster.nodes())
    cluster.submit("#!/bin/sh\nsleep 2\n", "--partition=main", f"--nodes={nodes}", "--exclusive").wait_for_end()
    for job in (saves, deaf):
        assert (job.wait_for_end(), job.restarts()) == ("COMPLETED", 1), job.describe()
    assert "requeued: stopped by a signal, and saved" in saves.log
    assert "SLURM ends the job, which is requeued" in deaf.log
