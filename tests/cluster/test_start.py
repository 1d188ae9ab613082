"""``srun python -m training.main`` is enough on a real SLURM, and what cannot work is said in seconds."""

from __future__ import annotations

import json
import re
import subprocess

from slurm.node_list import compress, expand
from tests.cluster.cluster import Cluster
from tests.faults.lab import prepare_data

FLAGS = (
    "--device cpu --precision fp32 --batch-size 4 --workers 0 --epochs 1 --warmup 2 --lr 1e-3 --local-loss "
    "--gather-with-grad --log-every-n-steps 1 --resume latest"
)
MEET = """
import os, sys, time
from datetime import timedelta
from training.config import EngineConfig
from training.distributed.runtime import close_runtime, start_runtime

rank = os.environ["SLURM_PROCID"]
for scenario in sys.argv[1:]:
    name, _, changes = scenario.partition(":")
    if name == "missing" and rank == "1":
        sys.exit(0)  # nothing is heard of it
    own = dict(os.environ)
    os.environ.update(change.split("=") for change in changes.split() if change)
    begun = time.monotonic()
    try:
        runtime = start_runtime(EngineConfig(device="cpu"), rendezvous_timeout=timedelta(seconds=15))
        said = f"met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        close_runtime(runtime)
    except (ValueError, RuntimeError) as error:
        said = f"refused after {time.monotonic() - begun:.0f} s: {error}"
    print(f"{name} {rank}: {said}", flush=True)
    os.environ.clear()
    os.environ.update(own)
"""
"""One rank, which tries what the arguments name, each with its changes to the environment."""


def test_an_array_of_two_runs_trains_on_nodes_that_they_share(cluster: Cluster) -> None:
    """No MASTER_ADDR, no MASTER_PORT, and both runs' rank 0 on the same node."""
    data = prepare_data(cluster.directory / "data")
    line = f"--train-data '{data}/shards/{{000..003}}.tar' --model {data}/tiny.json --logs {cluster.directory}/logs"
    script = f'#!/bin/bash\nsrun python -m training.main {FLAGS} {line} --name "run-$SLURM_ARRAY_TASK_ID"\n'
    array = cluster.submit(script, "--array=0-1", "--nodes=2", "--ntasks-per-node=1")
    for index in range(2):
        job = cluster.job(f"{array.number}_{index}", log=cluster.directory / "none")
        job.wait_for("COMPLETED", timeout_s=300)
        run = cluster.directory / f"logs/run-{index}"
        (start,) = (run / "starts.jsonl").read_text().splitlines()
        assert json.loads(start)["world_size"] == 2
        log = (run / "out.log").read_text()
        assert "global batch 8 = 4 per rank x 2 ranks" in log
        assert f"Finished run-{index}: see" in log


def test_rank_zeros_node_is_found_and_what_cannot_work_is_refused(cluster: Cluster) -> None:
    (cluster.directory / "meet.py").write_text(MEET)
    (cluster.directory / "hosts").write_text("node1\nnode0\n")
    python = f"python {cluster.directory}/meet.py"
    script = f"""#!/bin/bash
    srun --nodes=1 --ntasks=2 --cpus-per-task=1 --nodelist=node1 {python} part
    srun {python} unknown:MASTER_ADDR=no-such-host local:MASTER_ADDR=localhost left:WORLD_SIZE=1 missing
    SLURM_HOSTFILE=hosts srun --distribution=arbitrary {python} order
    {python} batch
    """
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    job.wait_for("COMPLETED", timeout_s=300)

    def said(scenario: str, rank: int) -> str:
        found = re.search(rf"^{scenario} {rank}: (.*)", job.log, re.MULTILINE)
        assert found, job.log
        return found[1]

    assert said("part", 0) == said("part", 1)
    assert re.fullmatch(r"met at node1:\d+", said("part", 0))  # a step on the job's second node
    for rank in range(2):
        assert f"rank {rank} on node{rank} cannot resolve 'no-such-host'" in said("unknown", rank)
        assert int(re.findall(r"refused after (\d+) s", said("unknown", rank))[0]) < 30
        assert "is every node itself, but the ranks run on 2 nodes: unset MASTER_ADDR" in said("local", rank)
        assert "WORLD_SIZE=1 but srun started SLURM_NTASKS=2 tasks: unset WORLD_SIZE" in said("left", rank)
    assert "1 of 2 ranks are missing: 1; nodes: node1 (0 of 1 came)" in said("missing", 0)
    assert "rank 0 runs on node1, but the step's first node node0 leads to node0" in said("order", 0)
    assert "has SLURM_NTASKS=2 tasks, but this process was not started by srun: put srun" in said("batch", 0)


def test_node_lists_are_read_as_scontrol_reads_them(cluster: Cluster) -> None:
    for node_list in ("n[3,1]", "n[08-11]", "m[01-02]x[1-2]", "a,,b", "n[1-2]-ib[0-1]", "[1-3]", "n[1-2][3-4]"):
        assert expand(node_list) == hostnames(node_list)
    names = ["n08", "n09", "n10", "n3", "n1i", "n2i", "login", "m01x1", "m01x2", "m02x1"]
    assert hostnames(compress(names)) == expand(compress(names))
    assert sorted(hostnames(compress(names))) == sorted(names)


def hostnames(node_list: str) -> list[str]:
    done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    return done.stdout.split()
