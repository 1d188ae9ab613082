"""One job of the real trainer through everything that a cluster does to it, and what is left: the undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from pathlib import Path

from safetensors.torch import load_file

from slurm.node_list import expand
from tests.cluster.batch_runs import batch_job, rank_log, submit
from tests.cluster.cluster import Cluster, Job
from tests.end_to_end.conftest import TINY_MODEL
from tests.factories import write_shards
from training.checkpoint.checkpointer import Checkpointer
from training.cli import parse, to_yaml
from training.data.trace import read_trace

_STEPS_PER_EPOCH, _EPOCHS = 12, 12


def _run(directory: Path, name: str) -> Path:
    """A run directory with the settings of a small run on two ranks."""
    shards = directory / "shards"
    if not shards.exists():
        write_shards(shards, shards=4, samples=24)
        (directory / "tiny.json").write_text(json.dumps(TINY_MODEL))
    flags = (
        f"--device cpu --precision fp32 --batch-size 4 --workers 1 --warmup 2 --lr 1e-3 --epochs {_EPOCHS} "
        "--save-frequency 0 --save-every-n-steps 5 --log-every-n-steps 1 --log-metric-every-n-steps 1 "
        "--trace-samples --force-patch-dropout 0.5 --local-loss --gather-with-grad"
    )
    data = ["--train-data", f"{shards}/{{000..003}}.tar", "--model", str(directory / "tiny.json")]
    run = directory / "logs" / name
    (run / "slurm").mkdir(parents=True)
    config = parse([*flags.split(), *data, "--logs", str(run.parent), "--name", name]).config
    (run / "submit.yaml").write_text(to_yaml(config))
    return run


def test_a_job_that_is_interrupted_in_every_way_ends_as_if_it_had_not_been(cluster: Cluster, tmp_path: Path) -> None:
    whole, night = _run(tmp_path, "whole"), _run(tmp_path, "night")
    wanted = submit(cluster, batch_job(whole, nodes=2, tasks_per_node=1))
    assert wanted.wait_for_end(timeout_s=300) == "COMPLETED", wanted.describe() + rank_log(whole)
    job = submit(cluster, batch_job(night, nodes=2, tasks_per_node=1, partition="low"))
    for number, disturb in enumerate((_ask, _kill_a_rank, _preempt, _lose_a_node)):
        _wait_for_progress(job, night, start=number)
        disturb(cluster, job)
        job.wait_for_text(f"start {number + 1} on ", timeout_s=200)
    assert job.wait_for_end(timeout_s=300) == "COMPLETED", job.describe() + rank_log(night)
    assert job.restarts() == 4
    assert len(re.findall(r"requeued: stopped by a signal, and saved", job.log)) == 2
    assert re.search(r"requeued: crash with code \d+, after progress from step_\d+ to step_\d+", job.log)
    assert _weights(night) == _weights(whole)
    assert _losses(night) == _losses(whole)
    assert _trace(night) == _trace(whole)


def _wait_for_progress(job: Job, run: Path, *, start: int) -> None:
    """Until this start has saved something of its own."""
    log, steps = run / "out.log", Checkpointer(run / "checkpoints").steps
    job.wait_for_text(f"start {start} on ")
    before = max(steps(), default=0)
    job.wait_for_text(rf"(?s)(Run night: rank 0 of 2.*){{{start + 1}}}", log, timeout_s=200)
    job.wait_until(lambda: max(steps(), default=0) > before, what="a checkpoint", timeout_s=200)


def _ask(cluster: Cluster, job: Job) -> None:
    """What SLURM does some minutes before the time limit."""
    job.signal("USR1")


def _kill_a_rank(cluster: Cluster, job: Job) -> None:
    wanted = {f"SLURM_JOB_ID={job.number}", "SLURM_PROCID=1", f"SLURM_CONF={os.environ['SLURM_CONF']}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = ((process / file).read_text(errors="replace") for file in ("cmdline", "environ"))
        except OSError:
            continue
        if "training.main" in line and wanted <= set(environment.split("\0")):
            os.kill(int(process.name), signal.SIGKILL)


def _preempt(cluster: Cluster, job: Job) -> None:
    nodes = len(cluster.nodes())
    more_important = cluster.submit(
        "#!/bin/sh\nsleep 2\n", "--partition=main", f"--nodes={nodes}", "--exclusive", log=cluster.directory / "high"
    )
    more_important.wait_for_end()


def _lose_a_node(cluster: Cluster, job: Job) -> None:
    node = expand(job.facts()["NodeList"])[-1]
    cluster.crash(node)
    cluster.boot(node)


def _weights(run: Path) -> str:
    newest = Checkpointer(run / "checkpoints").newest()
    assert newest is not None
    assert newest.name == f"step_{_STEPS_PER_EPOCH * _EPOCHS:08d}"
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(newest / "model.safetensors").items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}


def _trace(run: Path) -> dict[int, list[tuple[int, ...]]]:
    return {rank: records.tolist() for rank, records in read_trace(run / "trace").items()}
