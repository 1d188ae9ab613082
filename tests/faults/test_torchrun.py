"""Row 53: torchrun starts the ranks of a job again in place, and they go on from their checkpoint."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable

from tests.end_to_end.conftest import REPOSITORY
from tests.faults.lab import Lab, Record, compare, marked_processes, starts
from tests.faults.plan import MARK_VARIABLE, PLAN_VARIABLE, Fault, encode

LOOPS = int(os.environ.get("FAULT_LOOPS", "1"))
"""Restarts; each imports everything again. ``FAULT_LOOPS=10`` is the row as it is written."""


def _torchrun(lab: Lab, *plan: Fault, max_restarts: int) -> tuple[int, str]:
    """Exit code and output; nothing that it has started is left."""
    mark = secrets.token_hex(8)
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    restarts = ["--max-restarts", str(max_restarts), "--monitor-interval", "0.2"]
    # As long as restarted ranks share the store, they may read each other's old addresses (pytorch issue 135712).
    settings = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", PLAN_VARIABLE: encode(plan), MARK_VARIABLE: mark}
    try:
        done = subprocess.run(
            [sys.executable, *command, *restarts, "-m", "--", "tests.faults.victim", *lab.line("r")],
            cwd=REPOSITORY,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=90 + 30 * max_restarts,
        )
    finally:
        left = marked_processes(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert not left
    return done.returncode, done.stdout + done.stderr


def _kills(lab: Lab) -> list[Fault]:
    killed = {"path": str(lab.root / "kills"), "times": LOOPS}
    return [*lab.saved("r", 3), Fault("step", "kill_times", rank=1, step=5, with_=killed)]


def test_ranks_that_torchrun_starts_again_go_on(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    code, text = _torchrun(lab, *_kills(lab), max_restarts=LOOPS)
    assert code == 0, text[-4000:]
    assert [start["step"] for start in starts(lab.run_directory("r"))] == [0, *[3] * LOOPS]
    compare(undisturbed(), lab.record("r"))


def test_without_a_restart_the_job_ends(lab: Lab) -> None:
    """Negative control."""
    code, text = _torchrun(lab, *_kills(lab), max_restarts=0)
    assert code == 1
    assert re.search(r"exitcode\s*: -9", text)
    assert len(starts(lab.run_directory("r"))) == 1
