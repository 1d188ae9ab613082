"""``clipyard submit``, ``status``, ``logs`` and ``cancel`` on a real SLURM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import REPOSITORY, Cluster, Job

TINY = """\
model: demo-vit
dataset-type: synthetic
train-num-samples: {samples}
batch-size: 4
epochs: 1
save-frequency: 0
workers: 0
precision: fp32
device: cpu
warmup: 10
save-every-n-steps: 20
log-every-n-steps: 10
"""
ON_THIS_CLUSTER = ("--logs=logs", "--shared-run-directory", "--no-preflight", "--env=OMP_NUM_THREADS=1", "--time=20")


def clipyard(directory: Path, *words: str, code: int = 0) -> str:
    """What a command prints, of a user who works in ``directory``."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "training.commands.main", *words]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(cluster: Cluster, *words: str, samples: int) -> Job:
    """A job of the run file, which is ended with the test."""
    (cluster.directory / "tiny.yaml").write_text(TINY.format(samples=samples))
    out = clipyard(cluster.directory, "submit", "tiny.yaml", *ON_THIS_CLUSTER, *words)
    found = re.search(r"Submitted job (\d+)", out)
    assert found is not None, out
    name = next(word.removeprefix("--name=") for word in words if word.startswith("--name="))
    return cluster.job(found[1], log=cluster.directory / "logs" / name / "slurm" / f"job-{found[1]}.log")


def status(cluster: Cluster, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(clipyard(cluster.directory, "status", f"logs/{name}", "--json"))
    return found


def test_a_run_is_submitted_followed_cancelled_submitted_again_and_finished(cluster):
    out_log = cluster.directory / "logs" / "a" / "out.log"
    ours = ("--name=a", "--nodes=2")
    first = submit(cluster, *ours, "--", "--epochs=100", samples=320)
    first.wait_for_text(r"Train Epoch: 0 \[ *8/320", out_log, timeout_s=240)
    assert status(cluster, "a")["state"] == "running"
    again = clipyard(cluster.directory, "submit", "tiny.yaml", *ON_THIS_CLUSTER, *ours, code=2)
    assert f"run a is in use: job {first.number} is RUNNING" in again
    assert "rank 0 of 2" in clipyard(cluster.directory, "logs", "logs/a", "--rank", "0")
    cancelled = clipyard(cluster.directory, "cancel", "logs/a")
    step = re.search(r"Saved at step (\d+)", cancelled)
    assert step is not None, cancelled
    assert (status(cluster, "a")["state"], first.state(), first.restarts()) == ("cancelled", "COMPLETED", 0)

    last = 40 * (int(step[1]) // 40 + 1)
    shorter = ("--", f"--epochs={last // 40}")
    refused = clipyard(cluster.directory, "submit", "tiny.yaml", *ON_THIS_CLUSTER, *ours, *shorter, code=2)
    assert "cannot go on from" in refused
    assert "--allow-config-change" in refused
    second = submit(cluster, *ours, *shorter, "--allow-config-change=epochs", samples=320)
    second.wait_for("COMPLETED", timeout_s=400)
    found = status(cluster, "a")
    assert (found["state"], found["step"], found["total_steps"]) == ("finished", last, last)
    (_, start) = found["starts"]
    assert start["step"] == int(step[1])
    assert start["why"] == f"submitted again, after job {first.number} that was stopped by a signal"


def test_from_a_login_node_a_job_that_was_killed_holds_its_run_no_more(cluster, monkeypatch):
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    job = submit(cluster, "--name=e", "--nodes=1", "--", "--epochs=100", samples=320)
    job.wait_for_text(r"Train Epoch: 0 \[ *4/320", cluster.directory / "logs" / "e" / "out.log", timeout_s=240)
    (cluster.directory / "logs" / "e" / ".no-requeue").touch()
    subprocess.run(["scancel", "--signal=KILL", f"{job.number}.0"], check=True)
    job.wait_for_end()
    assert status(cluster, "e")["state"] == "cancelled"
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "another")  # whose jobs cannot be asked about here
    assert status(cluster, "e")["state"] == "running"


def test_an_array_sent_by_submitit_is_a_run_for_each_task(cluster):
    job = submit(cluster, "--name=b", "--nodes=1", "--array=0-1", "--with=submitit", samples=40)
    for task in (0, 1):
        cluster.job(f"{job.number}_{task}", log=job.log_path).wait_for("COMPLETED")
    seeds = [
        re.search(r"^seed: (\d+)$", (cluster.directory / f"logs/b-{task}/params.txt").read_text(), re.M)[1]
        for task in (0, 1)
    ]
    assert seeds == ["0", "1"]
    assert [status(cluster, f"b-{task}")["state"] for task in (0, 1)] == ["finished", "finished"]
    (log,) = clipyard(cluster.directory, "logs", "logs/b-1", "--job").splitlines()[-1:]
    assert f"job {job.number}_1 |" in log
    sent = cluster.directory / "logs" / "b" / "slurm" / "submitit" / f"{job.number}_submission.sh"
    assert sent.read_text() == (cluster.directory / "logs" / "b" / "submit.sbatch").read_text()


def test_a_job_that_waits_is_shown_and_cancelled_at_once_and_the_script_alone_submits_it_again(cluster):
    job = submit(cluster, "--name=c", "--nodes=1", "--sbatch-option=--begin=now+1hour", samples=40)
    found = status(cluster, "c")
    assert found["state"] == "waiting"
    assert "PENDING (BeginTime)" in str(found["detail"])
    behind = submit(cluster, "--name=c", "--nodes=1", f"--dependency=afterany:{job.number}", samples=40)
    assert behind.facts()["Dependency"].startswith(f"afterany:{job.number}")
    assert "There is no checkpoint." in clipyard(cluster.directory, "cancel", "logs/c")
    assert {job.wait_for_end(), behind.wait_for_end()} == {"CANCELLED"}
    by_hand = cluster.submit(cluster.directory / "logs/c/submit.sbatch", "--hold", log=job.log_path)
    assert by_hand.facts()["JobName"] == "c"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--partition=nowhere"], 2, "there is no partition nowhere here: pass --partition with one of"),
        (["--nodes=999"], 2, "nodes, so the job would wait for ever"),
        (["--sbatch-option=--qos"], 1, "sbatch refused"),
    ],
)
def test_what_this_cluster_cannot_run_is_refused_at_once(cluster, words, code, message):
    (cluster.directory / "tiny.yaml").write_text(TINY.format(samples=40))
    line = ("submit", "tiny.yaml", *ON_THIS_CLUSTER, "--name=d", "--no-python-check", *words)
    assert message in clipyard(cluster.directory, *line, code=code)
