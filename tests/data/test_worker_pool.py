"""Loader processes that die, fail, get signals or lose their trainer."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from tests.data.stream_simulation import Job, NumberDecoder, NumberSource, ids
from training.data.decode import Sample
from training.data.storage import Storage
from training.data.tar_reader import RawSample
from training.data.worker_pool import WorkerDied

SIZES = [9, 14, 3, 11, 8, 6, 12]


class SleepingPipes(NumberSource):
    """Reads from commands that say nothing."""

    def read_slot(self, slot: int, *, start: int, offset: int):
        with Storage().open("pipe:sleep 50") as stream:
            stream.read(1)
        return super().read_slot(slot, start=start, offset=offset)


class KillingDecoder(NumberDecoder):
    """Kills its own process at one sample: the first time only, or whenever it sees it."""

    def __init__(self, marker: Path, *, always: bool = False) -> None:
        super().__init__()
        self.marker = marker
        self.always = always

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        if raw.key.endswith("/5") and (self.always or not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(raw, seed=seed)


class GreedyDecoder(NumberDecoder):
    """Allows its process hardly any memory and asks for a lot, once."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        if raw.key.endswith("/5") and not self.marker.exists():
            self.marker.touch()
            resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
            bytearray(1 << 34)
        return super().decode(raw, seed=seed)


class FailingDecoder(NumberDecoder):
    def decode(self, raw: RawSample, *, seed: int) -> Sample:
        raise ZeroDivisionError(f"sample {raw.key}")


def children(pid: int) -> list[int]:
    """Processes below ``pid``, at any depth."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    direct = [int(child) for thread in threads for child in thread.read_text().split()]
    return direct + [below for child in direct for below in children(child)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> list[int]:
    """The processes that are still there after ten seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end and any(map(is_running, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def kill_trainer(code: str) -> list[str]:
    """Runs a trainer until it says that it is ready, kills it, and sees its processes end; their command lines."""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    pids = children(trainer.pid)
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert wait_until_gone(pids) == []
    return commands


def test_a_killed_worker_is_replaced_and_no_sample_is_lost_or_repeated(tmp_path, caplog):
    (loader,) = Job(NumberSource(SIZES), 7, 5, KillingDecoder(tmp_path / "killed"), workers=2).loaders(1, 6)
    batches = list(islice(loader, 6))
    whole = Job(NumberSource(SIZES), 7, 5).run(1, 6, 6)
    assert [ids(batch.record) for batch in batches] == whole
    assert sum(batch.record.counts["worker_restarts"] for batch in batches) == 1
    assert "signal 9" in caplog.text


def test_workers_that_die_again_and_again_end_the_run_with_the_signal_named(tmp_path):
    decoder = KillingDecoder(tmp_path / "killed", always=True)
    (loader,) = Job(NumberSource(SIZES), 7, 5, decoder, workers=1).loaders(1, 6)
    with pytest.raises(WorkerDied, match=r"worker 0 \(process \d+\): killed by signal 9"):
        list(islice(loader, 30))


def test_a_worker_that_finds_no_memory_is_replaced(tmp_path, caplog):
    decoder = GreedyDecoder(tmp_path / "greedy")
    (loader,) = Job(NumberSource(SIZES), 7, 5, decoder, workers=2).loaders(1, 6)
    assert [ids(batch.record) for batch in islice(loader, 6)] == Job(NumberSource(SIZES), 7, 5).run(1, 6, 6)
    assert "out of memory" in caplog.text


def test_workers_end_although_a_child_of_the_trainer_has_copies_of_their_pipes(tmp_path):
    """An evaluation forks its own processes while the training loader lives."""
    others = set(children(os.getpid()))
    (loader,) = Job(NumberSource(SIZES), 7, 5, workers=2).loaders(1, 6)
    batches = iter(loader)
    next(batches)
    pids = [pid for pid in children(os.getpid()) if pid not in others]
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        start = time.monotonic()
        batches.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 3
        assert wait_until_gone(pids) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_error_in_a_worker_reaches_the_trainer_as_it_is():
    (loader,) = Job(NumberSource(SIZES), 7, 5, FailingDecoder(), workers=2).loaders(1, 6)
    with pytest.raises(ZeroDivisionError, match="sample "):
        next(iter(loader))


def test_workers_ignore_the_signals_that_are_meant_for_their_trainer():
    others = set(children(os.getpid()))
    (loader,) = Job(NumberSource(SIZES), 7, 5, workers=2).loaders(1, 6)
    batches = iter(loader)
    next(batches)
    for pid in set(children(os.getpid())) - others:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    rest = list(islice(batches, 10))
    assert len(rest) == 10
    assert sum(batch.record.counts["worker_restarts"] for batch in rest) == 0


def test_workers_end_with_the_iterator():
    others = set(children(os.getpid()))
    (loader,) = Job(NumberSource(SIZES), 7, 5, workers=2).loaders(1, 6)
    batches = iter(loader)
    next(batches)
    pids = [pid for pid in children(os.getpid()) if pid not in others]
    assert len(pids) == 3
    batches.close()  # type: ignore[attr-defined]
    assert wait_until_gone(pids) == []


def test_workers_end_when_their_trainer_is_killed():
    code = f"""
import time
from tests.data.stream_simulation import Job, NumberSource
(loader,) = Job(NumberSource({SIZES}), 7, 5, workers=2).loaders(1, 6)
batches = iter(loader)
next(batches)
print("ready", flush=True)
time.sleep(60)
"""
    commands = kill_trainer(code)
    assert len(commands) == 3


def test_commands_end_with_the_workers_that_run_them():
    code = """
import time
from tests.data.test_worker_pool import SleepingPipes
from tests.data.stream_simulation import Job
(loader,) = Job(SleepingPipes([4] * 6), 6, 2, workers=2).loaders(1, 6)
batches = iter(loader)
import threading
threading.Thread(target=lambda: next(batches), daemon=True).start()
time.sleep(15)
print("ready", flush=True)
time.sleep(60)
"""
    assert any("sleep" in command for command in kill_trainer(code))


def test_nothing_of_the_ring_is_left_in_dev_shm():
    before = set(os.listdir("/dev/shm"))
    (loader,) = Job(NumberSource(SIZES), 7, 5, workers=1).loaders(1, 6)
    batches = iter(loader)
    next(batches)
    assert set(os.listdir("/dev/shm")) <= before
