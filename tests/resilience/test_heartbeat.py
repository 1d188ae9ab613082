"""A process that cannot notice its own hang is killed by the monitor beside it, which never outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.launch import start_ranks
from tests.resilience.jobs import train
from training.resilience.heartbeat import Heartbeat, killed_ranks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1.0
MEASURED_S = 2.0
"""Where the time is measured: a busy machine takes some tenths more, whatever the timeout."""
ALIVE = """
import ctypes, hashlib, os, signal, sys, time
from pathlib import Path
from training.resilience.heartbeat import Heartbeat
def hold_the_interpreter(): ctypes.PyDLL(None).sleep(60)
directory = Path(sys.argv[1]) if sys.argv[1] else None
heartbeat = Heartbeat(float(sys.argv[2]), rank=3, directory=directory)
print(heartbeat._monitor.pid if heartbeat._monitor else 0, flush=True)
exec(sys.argv[3])
heartbeat.close()
"""


class Rank(NamedTuple):
    process: subprocess.Popen[str]
    monitor: int
    """Its process number."""


@pytest.fixture
def start(tmp_path):
    """Starts a process with a heartbeat that runs a statement, in a process group of its own."""
    ranks = []

    def begin(statement: str, *, timeout_s: float = TIMEOUT_S, directory: str = str(tmp_path / "hangs")) -> Rank:
        command = [sys.executable, "-c", ALIVE, directory, str(timeout_s), statement]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        ranks.append(Rank(process, int(process.stdout.readline())))
        return ranks[-1]

    yield begin
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int, *, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_a_held_interpreter_is_killed_in_time_and_its_line_is_shown(start, tmp_path):
    rank = start("hold_the_interpreter()", timeout_s=MEASURED_S)
    began = time.monotonic()
    assert rank.process.wait(timeout=10) == -signal.SIGKILL
    assert time.monotonic() - began < 2 * MEASURED_S
    said = rank.process.stderr.read()
    assert f"rank 3 (process {rank.process.pid} on " in said
    assert "gave no sign of life for 2 s (native code holds the interpreter) and was killed" in said
    assert "in hold_the_interpreter" in (tmp_path / "hangs" / "rank_3.txt").read_text()
    assert ends(rank.monitor)


def test_a_stopped_process_is_killed_in_time(start, tmp_path):
    rank = start("time.sleep(60)", timeout_s=MEASURED_S)
    os.kill(rank.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert rank.process.wait(timeout=10) == -signal.SIGKILL
    assert time.monotonic() - began < 2 * MEASURED_S
    assert "it is stopped by a signal, such as SIGSTOP" in rank.process.stderr.read()
    (known,) = killed_ranks(tmp_path / "hangs")
    assert known[:3] == (3, rank.process.pid, 95)
    assert known[3].startswith("hang: rank 3")


def test_without_a_monitor_a_stopped_process_stays(start):
    """The control."""
    rank = start("time.sleep(60)", timeout_s=0)
    os.kill(rank.process.pid, signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.process.wait(timeout=2 * TIMEOUT_S)


def test_a_main_thread_in_native_code_that_lets_others_run_is_alive(start):
    rank = start("hashlib.pbkdf2_hmac('sha256', b'a', b'b', 5_000_000)", timeout_s=0.5)
    assert rank.process.wait(timeout=30) == 0
    assert rank.process.stderr.read() == ""


def test_a_job_that_was_suspended_as_a_whole_goes_on(start):
    rank = start("time.sleep(2)")
    os.killpg(rank.process.pid, signal.SIGSTOP)
    time.sleep(2.5 * TIMEOUT_S)
    os.killpg(rank.process.pid, signal.SIGCONT)
    assert rank.process.wait(timeout=10) == 0


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", "raise SystemExit(0)"])
def test_the_monitor_ends_with_its_process(start, end):
    rank = start(end)
    rank.process.wait(timeout=10)
    assert ends(rank.monitor)


def test_the_monitor_ends_although_a_child_has_a_copy_of_its_pipe(start):
    rank = start("os.fork() or time.sleep(2); os._exit(0)")
    rank.process.wait(timeout=10)
    assert ends(rank.monitor)


def test_the_monitor_leaves_signals_to_its_process(start):
    rank = start("signal.signal(signal.SIGUSR1, signal.SIG_IGN); print(); time.sleep(60)")
    rank.process.stdout.readline()
    os.killpg(rank.process.pid, signal.SIGUSR1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP):
        os.kill(rank.monitor, number)
    time.sleep(0.3)
    assert is_running(rank.monitor)
    os.kill(rank.process.pid, signal.SIGSTOP)
    assert rank.process.wait(timeout=10) == -signal.SIGKILL


def test_without_a_run_directory_the_stacks_go_to_stderr(start):
    rank = start("hold_the_interpreter()", directory="")
    assert rank.process.wait(timeout=10) == -signal.SIGKILL
    assert "in hold_the_interpreter" in rank.process.stderr.read()


def test_a_monitor_that_dies_is_missed_but_harms_nobody(start):
    rank = start("os.kill(heartbeat._monitor.pid, 9); time.sleep(1)")
    assert rank.process.wait(timeout=10) == 0
    assert "The heartbeat monitor is gone" in rank.process.stderr.read()


def test_the_monitor_imports_nothing_but_the_standard_library(start):
    rank = start("time.sleep(60)")
    maps = Path(f"/proc/{rank.monitor}/maps").read_text()
    assert "torch" not in maps
    assert "site-packages" not in maps


def test_what_an_earlier_start_died_of_is_forgotten(tmp_path):
    (tmp_path / "rank_0.killed.json").write_text(json.dumps({"rank": 0, "pid": 1, "text": "old"}))
    (tmp_path / "rank_1.killed.json").write_text("{")
    assert killed_ranks(tmp_path) == [(0, 1, 95, "hang: old")]
    heartbeat = Heartbeat(5.0, rank=0, directory=tmp_path)
    heartbeat.close()
    heartbeat.close()
    assert killed_ranks(tmp_path) == []
    assert killed_ranks(None) == []


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_job_of_a_killed_rank_ends_with_the_reason(tmp_path, culprit):
    """Rank 0 hosts the store as well: its neighbour finds the reason in the run directory."""
    files = [tmp_path / f"stderr-{rank}" for rank in range(2)]
    ranks = start_ranks(2, train, "hold_the_interpreter", culprit, tmp_path / "hangs", 60.0, TIMEOUT_S, stderr=files)
    for process in ranks:
        process.join(timeout=20)
    assert [process.exitcode for process in ranks] == [-9 if rank == culprit else 95 for rank in range(2)]
    said = files[1 - culprit].read_text()
    assert f"rank {culprit} failed first" in said
    assert "native code holds the interpreter" in said
