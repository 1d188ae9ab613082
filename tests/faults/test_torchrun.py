"""Row 53: torchrun starts the ranks of a job again in place, and they go on from their checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping

from tests.end_to_end.conftest import REPOSITORY
from tests.faults.lab import Lab, Record, compare, starts
from tests.faults.plan import PLAN_VARIABLE, Fault, encode

LOOPS = int(os.environ.get("FAULT_LOOPS", "1"))
"""Restarts; each imports everything again. ``FAULT_LOOPS=10`` is the row as it is written."""


def _torchrun(
    lab: Lab, *plan: Fault, max_restarts: int, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", str(max_restarts)]
    master = ["--master-addr", "127.0.0.1", "--master-port", "0", "--monitor-interval", "0.2"]
    return subprocess.run(
        [sys.executable, *command, *master, "-m", "tests.faults.victim", *lab.line("r")],
        cwd=REPOSITORY,
        env={**os.environ, PLAN_VARIABLE: encode(plan), **environment},
        capture_output=True,
        text=True,
        timeout=60 + 30 * max_restarts,
    )


def _kills(lab: Lab) -> list[Fault]:
    killed = {"path": str(lab.root / "kills"), "times": LOOPS}
    return [*lab.saved("r", 3), Fault("step", "kill_times", rank=1, step=5, with_=killed)]


def test_ranks_that_torchrun_starts_again_go_on(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = _torchrun(lab, *_kills(lab), max_restarts=LOOPS, environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [start["step"] for start in starts(lab.run_directory("r"))] == [0, *[3] * LOOPS]
    compare(undisturbed(), lab.record("r"))


def test_without_a_restart_the_job_ends(lab: Lab) -> None:
    """Negative control."""
    done = _torchrun(lab, *_kills(lab), max_restarts=0, environment={})
    assert done.returncode == 1
    assert re.search(r"exitcode\s*: -9", done.stderr)
    assert len(starts(lab.run_directory("r"))) == 1
