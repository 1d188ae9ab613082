"""One start owns a run directory; the next one takes over only what has certainly ended, and fences it off."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.resilience.lease import Lease, LeaseLost, claim_lease, find_owner
from training.resilience.owner import _cluster_name, this_process

CLAIM = (
    "import sys, time; from pathlib import Path; from training.resilience.lease import claim_lease\n"
    "claim_lease(Path(sys.argv[1]), take_over=False); print('owner', flush=True); time.sleep(60)"
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def leases(tmp_path):
    return tmp_path / "run" / "leases"


@pytest.fixture
def start(leases):
    """Starts a process that claims the run and stays; ``.stdout`` has a line once it owns it."""
    started = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLAIM, str(leases)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def owned(leases, start):
    """The process that owns the run."""
    owner = start()
    assert owner.stdout.readline() == "owner\n"
    return owner


def rewrite(leases: Path, **changes: object) -> None:
    """The newest lease, as another process or machine would have written it."""
    path = max(leases.glob("*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def elsewhere(leases: Path, **changes: object) -> None:
    """A lease of a process that nobody here can see."""
    rewrite(leases, **{"host": "node7", "machine": "m7", "boot": "b7"} | changes)


def put_squeue(monkeypatch, directory: Path, script: str, *, name: str = "squeue") -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_a_start_owns_the_run_and_the_next_is_one_generation_on(leases):
    first = claim_lease(leases, take_over=False)
    first.check()
    first.release()
    first.release()
    assert (first.generation, claim_lease(leases, take_over=False).generation) == (1, 2)
    assert sorted(path.name for path in leases.iterdir()) == ["00000001.json", "00000001.released", "00000002.json"]


def test_a_second_job_is_refused_with_the_name_of_the_first(leases, owned):
    message = rf"run run is in use by process {owned.pid} on .*: wait until it has ended.*pass --take-over"
    with pytest.raises(ValueError, match=message):
        claim_lease(leases, take_over=False)
    Lease(leases, 1).check()


def test_a_stopped_owner_is_still_the_owner(leases, owned):
    owned.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match="is in use by"):
        claim_lease(leases, take_over=False)


def test_a_killed_owner_is_followed_at_once(leases, owned):
    owned.kill()
    time.sleep(0.1)  # not waited for: only its exit status is left
    assert claim_lease(leases, take_over=False).generation == 2


def test_a_process_that_has_its_number_by_now_is_not_the_owner(leases, owned):
    rewrite(leases, started="1")
    assert claim_lease(leases, take_over=False).generation == 2


def test_whoever_asks_for_the_owner_changes_nothing(leases, owned):
    before = sorted(leases.iterdir())
    assert re.fullmatch(rf"process {owned.pid} on .*", find_owner(leases) or "")
    owned.kill()
    owned.wait()
    assert find_owner(leases) is None
    elsewhere(leases)
    assert "on node7" in (find_owner(leases) or "")
    assert sorted(leases.iterdir()) == before


def test_a_run_that_was_released_or_never_claimed_has_no_owner(leases):
    assert find_owner(leases) is None
    leases.mkdir(parents=True)
    assert find_owner(leases) is None
    lease = claim_lease(leases, take_over=False)
    elsewhere(leases)
    lease.release()
    assert find_owner(leases) is None
    (leases / "00000002.json").write_text("{")
    assert "cannot be read" in (find_owner(leases) or "")


def test_take_over_fences_the_owner_off(leases, owned, caplog):
    second = claim_lease(leases, take_over=True)
    assert f"--take-over: the run is taken from process {owned.pid}" in caplog.text
    with pytest.raises(LeaseLost, match="belongs to generation 2 now, this process is generation 1"):
        Lease(leases, 1).check()
    second.check()


def test_of_many_that_start_together_exactly_one_wins(leases, start):
    racers = [start() for _ in range(6)]
    deadline = time.monotonic() + 20
    while sum(racer.poll() is None for racer in racers) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    losers = [racer for racer in racers if racer.poll() is not None]
    assert len(losers) == 5
    assert all("is in use by process" in loser.stderr.read() for loser in losers)
    assert [path.name for path in leases.iterdir()] == ["00000001.json"]


def test_nothing_is_written_after_the_release(leases):
    lease = claim_lease(leases, take_over=False)
    lease.release()
    with pytest.raises(LeaseLost, match="generation 1 of .*run was released already"):
        lease.check()


def test_an_owner_whose_lease_was_removed_writes_nothing(leases):
    lease = claim_lease(leases, take_over=False)
    (leases / "00000001.json").unlink()
    with pytest.raises(LeaseLost, match="00000001.json is gone: somebody has removed or replaced the run directory"):
        lease.check()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "\x00" * 50])
def test_a_damaged_lease_is_respected_until_told_otherwise(leases, text):
    claim_lease(leases, take_over=False)
    (leases / "00000001.json").write_text(text)
    with pytest.raises(ValueError, match="in use by somebody whose lease .*00000001.json cannot be read.*--take-over"):
        claim_lease(leases, take_over=False)
    assert claim_lease(leases, take_over=True).generation == 2


@pytest.mark.parametrize("days", [-400, -1, 1, 400])
def test_clocks_and_modification_times_change_nothing(leases, owned, monkeypatch, days):
    shifted = time.time() + days * 86400
    os.utime(leases / "00000001.json", (shifted, shifted))
    monkeypatch.setattr(time, "time", lambda: shifted)
    Lease(leases, 1).check()
    with pytest.raises(ValueError, match="is in use by"):
        claim_lease(leases, take_over=False)
    owned.kill()
    owned.wait()
    second = claim_lease(leases, take_over=False)
    os.utime(leases / "00000002.json", (0, 0))
    second.check()


def test_the_owner_on_another_machine_is_believed_alive(leases):
    claim_lease(leases, take_over=False)
    elsewhere(leases)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on node7: .*this machine cannot see that"):
        claim_lease(leases, take_over=False)


def test_an_owner_in_another_container_of_this_machine_is_believed_alive(leases):
    claim_lease(leases, take_over=False)
    rewrite(leases, namespace="pid:[1]")
    with pytest.raises(ValueError, match="is in use by"):
        claim_lease(leases, take_over=False)


def test_an_owner_from_before_the_last_boot_has_ended(leases):
    claim_lease(leases, take_over=False)
    rewrite(leases, boot="an earlier one")
    assert claim_lease(leases, take_over=False).generation == 2


@pytest.mark.parametrize(
    ("script", "ended"),
    [
        ("echo RUNNING", False),
        ("echo COMPLETING", False),
        ("echo TIMEOUT", True),
        ("echo PENDING", True),
        ("exit 0", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
        # The job goes on, and the step that owned the run has ended; then: the numbers of an array say nothing.
        ('case "$*" in *--steps*) echo 55.1;; *) echo RUNNING;; esac', True),
        ('case "$*" in *--steps*) echo 55.0;; *) echo RUNNING;; esac', False),
        ('case "$*" in *--steps*) echo 54_1.3;; *) echo RUNNING;; esac', False),
    ],
)
def test_the_scheduler_is_asked_about_the_jobs_of_other_nodes(leases, tmp_path, monkeypatch, script, ended):
    put_squeue(monkeypatch, tmp_path / "bin", script)
    claim_lease(leases, take_over=False)
    elsewhere(leases, job="55", step="0")
    if ended:
        assert claim_lease(leases, take_over=False, environment={"SLURM_JOB_ID": "56"}).generation == 2
    else:
        with pytest.raises(ValueError, match="on node7, SLURM job 55: wait"):
            claim_lease(leases, take_over=False, environment={"SLURM_JOB_ID": "56"})


def test_without_squeue_a_job_of_another_node_is_believed_alive(leases, monkeypatch, tmp_path):
    claim_lease(leases, take_over=False)
    elsewhere(leases, job="55")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="SLURM job 55"):
        claim_lease(leases, take_over=False)


def test_the_job_numbers_of_another_cluster_are_not_asked_about(leases, tmp_path, monkeypatch):
    put_squeue(monkeypatch, tmp_path / "bin", "exit 0")
    claim_lease(leases, take_over=False)
    elsewhere(leases, job="55", cluster="other")
    with pytest.raises(ValueError, match="SLURM job 55"):
        claim_lease(leases, take_over=False, environment={"SLURM_CLUSTER_NAME": "this"})


@pytest.mark.parametrize(("answer", "ended"), [("ClusterName             = c1", True), ("ClusterName = c2", False)])
def test_a_login_node_knows_its_cluster_and_asks_about_the_jobs_of_that(leases, tmp_path, monkeypatch, answer, ended):
    put_squeue(monkeypatch, tmp_path / "bin", "exit 0")
    put_squeue(monkeypatch, tmp_path / "bin", f"echo '{answer}'", name="scontrol")
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    _cluster_name.cache_clear()
    claim_lease(leases, take_over=False)
    elsewhere(leases, job="55", cluster="c1")
    assert (find_owner(leases) is None) == ended
    _cluster_name.cache_clear()


def test_a_cluster_that_does_not_answer_has_no_name(tmp_path, monkeypatch):
    put_squeue(monkeypatch, tmp_path / "bin", "echo 'Unable to contact slurm controller' >&2; exit 1", name="scontrol")
    _cluster_name.cache_clear()
    assert this_process({}).cluster == ""
    _cluster_name.cache_clear()


def test_a_requeued_job_follows_itself(leases):
    job = {"SLURM_JOB_ID": "55", "SLURM_CLUSTER_NAME": "c"}
    claim_lease(leases, take_over=False, environment=job)
    elsewhere(leases)
    again = job | {"SLURM_RESTART_COUNT": "1"}
    assert claim_lease(leases, take_over=False, environment=again).generation == 2


def test_what_a_killed_start_left_half_way_is_removed(leases):
    leases.mkdir(parents=True)
    (leases / ".claim-0011").touch()
    claim_lease(leases, take_over=False)
    assert [path.name for path in leases.iterdir()] == ["00000001.json"]


def test_a_file_system_without_hard_links_will_do(leases, monkeypatch):
    def no_links(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert claim_lease(leases, take_over=False).generation == 1
    assert claim_lease(leases, take_over=True).generation == 2


def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"run cannot be written \(Not a directory\): pass --logs DIR"):
        claim_lease(tmp_path / "run" / "leases", take_over=False)
