"""A rank that hangs ends its job within the time allowed, is named with what the others wait for, and leaves stacks."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.launch import start_ranks
from tests.resilience.jobs import train
from training.config import ResilienceConfig
from training.resilience.watchdog import Watchdog

TIMEOUT_S = 1.5
# The thread of a watchdog ends with SystemExit here, where the process would.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Ended(NamedTuple):
    codes: list[int | None]
    stderr: list[str]
    hangs: Path
    seconds: float


@pytest.fixture
def run_job(tmp_path):
    def run(hang: str, culprit: int, *, ranks: int = 2, timeout_s: float = TIMEOUT_S, patience_s: float = 20) -> Ended:
        files, hangs = [tmp_path / f"stderr-{rank}" for rank in range(ranks)], tmp_path / "hangs"
        processes = start_ranks(ranks, train, hang, culprit, hangs, timeout_s, stderr=files)
        start = time.monotonic()
        for process in processes:
            process.join(timeout=max(0.0, start + patience_s - time.monotonic()))
        codes, seconds = [process.exitcode for process in processes], time.monotonic() - start
        for process in processes:
            process.kill()
            process.join()
        return Ended(codes, [file.read_text() for file in files], hangs, seconds)

    return run


def test_a_healthy_job_is_left_alone(run_job):
    ended = run_job("nothing", 1)
    assert ended.codes == [0, 0]
    assert ended.stderr == ["", ""]
    assert not ended.hangs.exists()


@pytest.mark.parametrize("hang", ["sleep_in_a_step", "wait_for_data"])
def test_a_rank_that_does_not_arrive_is_named_with_its_line_and_the_collective(run_job, hang):
    ended = run_job(hang, 1)
    assert ended.codes == [95, 95]
    for text in ended.stderr:
        assert "rank 1 failed first" in text
        assert f"in {hang}; rank 0 waits for it in all_reduce #8; stacks of all threads: {ended.hangs}" in text
    assert f"in {hang}" in (ended.hangs / "rank_1.txt").read_text()
    waits = (ended.hangs / "rank_0.txt").read_text()
    assert "last collective: all_reduce #8 (waits for it)" in waits
    assert "in all_reduce_sum" in waits
    assert len(json.loads((ended.hangs / "rank_0.collectives.json").read_text())["entries"]) == 8


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_named_and_killed_by_its_neighbour(run_job, culprit):
    """Rank 0 hosts the store as well: nobody answers."""
    ended = run_job("stop_itself", culprit)
    assert ended.codes == [-9 if rank == culprit else 95 for rank in range(2)]
    said = ended.stderr[1 - culprit]
    assert f"rank {culprit} failed first" in said
    assert "silent since step 7: stopped, " in said
    assert f"rank {1 - culprit} waits for it in all_reduce #8" in said
    assert ended.seconds < TIMEOUT_S + 11  # and a second for the steps before


def test_a_single_process_that_hangs_is_ended_with_its_line(run_job):
    ended = run_job("sleep_in_a_step", 0, ranks=1)
    assert ended.codes == [95]
    assert "rank 0 failed: hang: rank 0" in ended.stderr[0]
    assert "in sleep_in_a_step" in (ended.hangs / "rank_0.txt").read_text()


def test_without_the_watchdog_nobody_notices(run_job):
    """The control: what the tests above see is the watchdog's doing."""
    assert run_job("sleep_in_a_step", 1, timeout_s=1000, patience_s=4).codes == [None, None]


class LoneBoard:
    """A job of one rank, or one that nobody answers in."""

    def __init__(self, *, silent: bool = False) -> None:
        self.silent = silent
        self.posted: dict[int, str] = {}
        self.gone = 0

    def asked(self) -> bool:
        return self._answer(bool(self.posted))

    def post(self, note: str) -> int:
        self.posted[0] = note
        return self._answer(1)

    def notes(self) -> dict[int, str]:
        return self.posted

    def left(self) -> set[int]:
        return set()

    def leave(self) -> None:
        self.gone += 1

    def _answer(self, value: Any) -> Any:
        if self.silent:
            raise RuntimeError("no answer within 3 s")
        return value


class NoRecorder:
    def last(self) -> None:
        raise KeyError("another release's format")

    def write(self, path: Path) -> None:
        raise OSError("No space left on device")


class Watched:
    """A watchdog whose end of the job is written down."""

    def __init__(self, directory: Path | None, *, silent: bool = False, **timeouts: float) -> None:
        self.ended = threading.Event()
        self.end: tuple[Any, ...] = ()
        self.board = LoneBoard(silent=silent)
        config = ResilienceConfig(**{"timeout_start": 60, "timeout_step": 60, "timeout_evaluation": 60} | timeouts)
        self.watchdog = Watchdog(
            config,
            rank=0, world_size=1, directory=directory, board=self.board, recorder=NoRecorder(), end_job=self.end_job,
        )  # fmt: skip

    def ends(self, seconds: float) -> bool:
        self.ended.wait(seconds)
        self.watchdog._thread.join(0.5)
        return self.ended.is_set()

    def end_job(self, *end: Any) -> None:
        self.end = end
        self.ended.set()
        raise SystemExit


def test_the_time_for_a_step_counts_from_the_first_step_on(tmp_path):
    watched = Watched(tmp_path, timeout_step=0.3)
    assert not watched.ended.wait(0.8)  # still the start
    watched.watchdog.beat(1)
    assert watched.ends(2)
    rank, code, text, silent = watched.end
    assert (rank, code, silent) == (0, 95, ())
    assert "after step 1, in step, at" in text


def test_a_start_that_never_gets_to_a_step_is_ended(tmp_path):
    watched = Watched(tmp_path, timeout_start=0.3)
    assert watched.ends(2)
    assert "after step 0, in start-up, at" in watched.end[2]


def test_an_evaluation_may_take_longer_than_a_step(tmp_path):
    watched = Watched(tmp_path, timeout_step=0.4, timeout_evaluation=2)
    watched.watchdog.beat(1)
    with watched.watchdog.phase("evaluation"):
        assert not watched.ended.wait(1.0)
    assert not watched.ended.wait(0.2)  # a step's time begins again
    with watched.watchdog.phase("save"):
        assert watched.ends(4)
    assert "in save, at" in watched.end[2]


def test_beats_keep_it_quiet_until_it_is_closed(tmp_path):
    watched = Watched(tmp_path, timeout_step=0.4, timeout_start=0.4)
    for step in range(10):
        watched.watchdog.beat(step)
        assert not watched.ended.wait(0.1)
    watched.watchdog.close()
    watched.watchdog.close()
    assert not watched.ended.wait(0.6)
    assert watched.board.gone == 1


def test_a_full_disk_or_a_changed_recorder_keeps_no_job_alive(tmp_path, caplog):
    (tmp_path / "file").touch()
    watched = Watched(tmp_path / "file" / "hangs", timeout_start=0.2)
    assert watched.ends(2)
    assert "the flight recorder cannot be read: KeyError" in caplog.text
    assert "the stacks of rank 0 could not be written: NotADirectoryError" in caplog.text


def test_a_store_that_does_not_answer_is_blamed_on_its_host(tmp_path):
    watched = Watched(tmp_path, silent=True, timeout_start=0.2)
    assert watched.ends(2)
    assert watched.end[0] == 0
    assert "rank 0, or the launcher on its node, is silent since step 0" in watched.end[2]


def test_without_a_run_directory_the_stacks_go_to_stderr(capfd):
    watched = Watched(None, timeout_start=0.2)
    assert watched.ends(2)
    time.sleep(0.05)
    assert "in test_without_a_run_directory_the_stacks_go_to_stderr" in capfd.readouterr().err


def test_a_rank_that_another_asks_answers_although_its_own_time_is_not_up(tmp_path):
    watched = Watched(tmp_path)
    watched.board.posted[0] = "somebody's"
    assert watched.ends(3)
    assert (tmp_path / "rank_0.txt").exists()
