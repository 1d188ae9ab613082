"""A signal becomes a flag that all ranks agree on; processes beside the rank neither die of it nor report it."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.distributed.launch import current_runtime, run_ranks
from training.distributed.collectives import gather_objects
from training.resilience.preemption import STOP_SIGNALS, Preemption, shield_worker
from training.resilience.sentinel import remove_sentinels, requeue_forbidden, sentinel_path, write_sentinel


@pytest.fixture
def preemption():
    with Preemption() as preemption:
        yield preemption


def wait_until(condition, *, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_process_goes_on(preemption, number):
    assert preemption.requested is None
    os.kill(os.getpid(), number)
    wait_until(lambda: preemption.requested is not None)
    assert preemption.requested == number.name


def test_a_second_signal_changes_nothing(preemption, caplog):
    with caplog.at_level(logging.WARNING):
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        wait_until(lambda: "SIGTERM received" in caplog.text)
    assert preemption.requested == "SIGUSR1"
    assert caplog.text.count("the run saves and stops") == 1
    assert "SIGTERM received: the run is about to stop already (SIGUSR1)" in caplog.text


def test_a_signal_is_seen_while_the_main_thread_is_in_native_code(preemption):
    seen = []

    def send_and_look() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: preemption.requested is not None)
        seen.append(time.monotonic())

    thread = threading.Thread(target=send_and_look)
    thread.start()
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)  # a second, without the interpreter, whatever arrives
    returned = time.monotonic()
    thread.join()
    assert seen[0] < returned - 0.1


def test_the_signals_are_given_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    preemption = Preemption()
    preemption.close()
    preemption.close()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_sigquit_shows_all_stacks_and_the_process_goes_on():
    code = (
        "import os, signal; from training.resilience.preemption import Preemption\n"
        "def somewhere(): os.kill(os.getpid(), signal.SIGQUIT)\n"
        "with Preemption(): somewhere(); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "went on\n"
    assert "in somewhere" in done.stderr
    assert "in _listen" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_forked_child_ignores_what_is_meant_for_its_parent(preemption, number):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert preemption.requested is None


def test_ending_a_child_ends_it_at_once_and_not_the_run(preemption):
    for _ in range(20):  # the signal comes while the child starts, at another place each time
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(timeout=60)
        assert child.exitcode == -signal.SIGTERM
    time.sleep(0.1)
    assert preemption.requested is None


def test_a_shielded_worker_is_out_of_reach_of_signals_to_the_group():
    code = (
        "import os, signal, sys; from training.resilience.preemption import shield_worker\n"
        "child = os.fork()\n"
        "if child == 0: shield_worker(0); print(os.getpgid(0) == os.getpid(), flush=True); os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    assert shield_worker.__doc__
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "True\n"


def one_rank_gets_a_signal() -> str | None:
    with Preemption() as preemption:
        if current_runtime().rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return preemption.agreed(gather_objects)


def test_all_ranks_agree_on_the_signal_of_one():
    assert run_ranks(2, one_rank_gets_a_signal) == ["SIGUSR2", "SIGUSR2"]


def test_ranks_without_a_signal_agree_on_none(preemption):
    assert preemption.agreed(lambda name: [name, None]) is None


def test_the_sentinel_says_which_signal_stopped_the_run_and_where(tmp_path):
    path = write_sentinel(tmp_path, signal_name="SIGUSR1", step=12, environment={"SLURM_JOB_ID": "345"})
    assert path == tmp_path / ".requeue.345"
    record = json.loads(path.read_text())
    assert record.pop("time").endswith("+00:00")
    assert record == {"signal": "SIGUSR1", "step": 12}
    assert [entry.name for entry in tmp_path.iterdir()] == [".requeue.345"]


def test_the_next_start_removes_the_sentinels_of_all_jobs(tmp_path):
    write_sentinel(tmp_path, signal_name="SIGUSR1", step=1, environment={"SLURM_JOB_ID": "345"})
    write_sentinel(tmp_path, signal_name="SIGTERM", step=2, environment={})
    assert sentinel_path(tmp_path, environment={}).name == ".requeue.local"
    remove_sentinels(tmp_path)
    remove_sentinels(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_cancelled_for_good_is_not_requeued(tmp_path):
    assert not requeue_forbidden(tmp_path)
    (tmp_path / ".no-requeue").touch()
    assert requeue_forbidden(tmp_path)
