"""A failure on any rank ends all ranks, quickly, with an honest code and the first rank's traceback."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.jobs import main, main_without_the_guard
from tests.distributed.launch import free_port, start_ranks

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    codes: list[int | None]
    stderr: list[str]
    seconds: float
    """From the moment the first rank was gone until the last one was."""


@pytest.fixture
def run_job(tmp_path):
    def run(name: str, *, ranks: int = 2, start: Any = main) -> Ended:
        """Starts the ranks as a launcher would, and kills nothing: they have to end by themselves."""
        files = [tmp_path / f"stderr-{rank}" for rank in range(ranks)]
        processes = start_ranks(ranks, start, name, stderr=files)
        while all(process.is_alive() for process in processes):
            time.sleep(0.02)
        first_gone = time.monotonic()
        for process in processes:
            process.join(timeout=60)
        return Ended(
            [process.exitcode for process in processes],
            [file.read_text() for file in files],
            time.monotonic() - first_gone,
        )

    return run


def test_a_healthy_job_ends_with_code_zero_and_says_nothing(run_job):
    ended = run_job("clean")
    assert ended.codes == [0, 0]
    assert "failed first" not in "".join(ended.stderr)


@pytest.mark.parametrize(
    ("job", "rank", "planted"),
    [
        ("fails_before_a_collective", 1, "ValueError: planted before"),
        ("fails_on_rank_zero", 0, "ValueError: planted on the host of the store"),
        ("fails_within_a_collective", 1, "ValueError: planted within"),
        ("fails_after_a_collective", 1, "ValueError: planted after"),
        ("fails_while_the_other_computes", 1, "ValueError: planted beside"),
        ("leaves_its_group_first", 1, "ValueError: planted after closing the connection"),
        ("hangs_in_native_code_at_exit", 1, "ValueError: planted with a thread that stays"),
    ],
)
def test_an_error_ends_both_ranks_and_both_name_the_rank_that_failed_first(run_job, job, rank, planted):
    ended = run_job(job)
    assert ended.codes == [1, 1]
    assert ended.seconds < 10
    for text in ended.stderr:
        assert f"rank {rank} failed first" in text
        assert planted in text
    assert "Traceback" in ended.stderr[0]
    assert "Traceback" in ended.stderr[rank]


@pytest.mark.parametrize(
    ("job", "killed", "said"),
    [
        ("is_killed", 1, "ended without a Python error"),
        ("is_killed_while_the_other_computes", 1, "ended without a Python error"),
        ("host_is_killed_while_the_other_computes", 0, "rank 0 failed first"),
    ],
)
def test_a_killed_rank_takes_the_other_with_it_within_seconds(run_job, job, killed, said):
    ended = run_job(job)
    assert ended.codes[killed] == -9
    assert ended.codes[1 - killed] == 1
    assert ended.seconds < 5
    assert f"rank {killed} failed first" in ended.stderr[1 - killed]
    assert said in ended.stderr[1 - killed]


def test_the_host_of_the_store_is_named_by_a_rank_that_was_in_a_collective_with_it(run_job):
    ended = run_job("host_is_killed_while_the_other_waits")
    assert ended.codes == [-9, 1]
    assert ended.seconds < 5
    assert "rank 0 failed first: its process or the launcher on its node is gone" in ended.stderr[1]


def test_a_rank_that_hangs_is_killed_by_its_neighbour_and_named_with_the_given_code(run_job):
    ended = run_job("blames_the_other_from_a_thread")
    assert ended.codes == [95, -9]
    assert ended.seconds < 5
    assert "rank 1 failed first: \nplanted hang" in ended.stderr[0]
    assert "Killing rank 1, process" in ended.stderr[0]
    assert "last act" in ended.stderr[0]


def test_a_single_process_is_ended_from_a_thread_whatever_its_last_act_does(run_job):
    ended = run_job("ends_alone", ranks=1)
    assert ended.codes == [95]
    assert "rank 0 failed: planted hang" in ended.stderr[0]
    assert "on the way out: ZeroDivisionError" in ended.stderr[0]


@pytest.mark.parametrize(("job", "code"), [("exits_with_a_code", 7), ("is_interrupted", 130), ("exits_with_zero", 0)])
def test_exit_codes_are_those_of_the_rank_that_asked_for_them(run_job, job, code):
    assert run_job(job).codes == [code, code]


def test_under_torchrun_the_traceback_of_the_failing_rank_is_printed():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.jobs", "fails_after_a_collective"],
        cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rank 1 failed first" in done.stderr
    assert "ValueError: planted after" in done.stderr


def test_a_single_process_fails_as_python_does(run_job):
    ended = run_job("fails_on_rank_zero", ranks=1)
    assert ended.codes == [1]
    assert ended.stderr[0].rstrip().endswith("ValueError: planted on the host of the store")


def test_an_error_during_the_start_ends_the_rank_that_waits_in_the_group(run_job):
    ended = run_job("clean_without_a_device")
    assert ended.codes == [1, 1]
    assert all("--device nonsense: not a device" in text for text in ended.stderr)


def test_without_the_guard_the_other_rank_never_hears_of_it(run_job):
    """The control: what the tests above see is the guard's doing."""
    job = "fails_while_the_other_computes_briefly"
    assert run_job(job, start=main_without_the_guard).codes == [0, 1]
    assert run_job(job).codes == [1, 1]
