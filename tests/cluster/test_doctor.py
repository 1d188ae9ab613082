"""The doctor as a step of a job: finds the broken one of two nodes, and names the node that does not answer."""

from __future__ import annotations

import json
import sys

from tests.cluster.cluster import Cluster

SCRIPT = """#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=2 --time=10
run=$PWD/run
mkdir -p "$run"
broken=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
on_broken() { srun --nodes=1 --ntasks=1 --nodelist="$broken" bash -c "$1"; }
doctor="%(python)s -m training.commands.doctor --slurm --quick --device=cpu"

# Nobody mounted the parallel file system there, and the container has 64 MiB for NCCL.
on_broken "mount -t tmpfs none '$run'; mount -t tmpfs -o size=64m none /dev/shm"
srun --kill-on-bad-exit=1 $doctor --run "$run" --json "$run/broken.json"
echo "broken: $?"
on_broken "umount '$run' /dev/shm"

srun --ntasks-per-node=1 --ntasks=2 --kill-on-bad-exit=1 bash -c "
    if [[ \\$SLURMD_NODENAME == $broken ]]; then exec sleep 300; fi
    exec $doctor --run '$run' --json '$run/silent.json' --arrival-limit 3"
echo "silent: $?"
"""


def test_the_broken_node_and_the_silent_one_are_named_with_code_95(cluster: Cluster) -> None:
    job = cluster.submit(SCRIPT % {"python": sys.executable})
    job.wait_for("COMPLETED", timeout_s=300)
    _, broken = cluster.nodes()[:2]
    assert "broken: 95" in job.log
    assert "silent: 143" in job.log  # 95 as well, but srun reports the signal with which it ended the silent task
    assert job.log.count(f"Exclude 1 of 2: --exclude={broken}\n") == 2
    found = [json.loads((cluster.directory / "run" / f"{name}.json").read_text()) for name in ("broken", "silent")]
    assert [verdict["exclude"] for verdict in found] == [[broken], [broken]]
    reasons = [json.loads(line) for line in (cluster.directory / "run" / "bad_nodes.jsonl").read_text().splitlines()]
    assert [record["node"] for record in reasons] == [broken, broken]
    assert "shared memory: /dev/shm has 0.1 GiB free of 0.1, 1 GiB are needed" in reasons[0]["reason"]
    assert "run directory: does not hold what the other nodes write into it (it is on tmpfs there)" in job.log
    assert "presence: none of its ranks came in time" in reasons[1]["reason"]
