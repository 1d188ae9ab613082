"""Rows 16, 17 and 23 to 25 end to end: workers and storage that fail under two ranks. tests/data has the other rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.lab import SHARDS, Disagreement, Lab, Record, compare
from tests.faults.plan import Fault
from tests.s3.client import Bucket
from tests.s3.server import Fault as StorageFault

WORKERS = ("--workers", "1")


@pytest.fixture
def bucket(s3: Bucket, fault_data: Path) -> Bucket:
    """The shards on a server."""
    s3.upload_directory(fault_data / "shards")
    return s3


def _from(bucket: Bucket) -> list[str]:
    return ["--train-data", f"pipe:aws s3 cp s3://{bucket.name}/{{000..{SHARDS - 1:03d}}}.tar -"]


def _fail_all(bucket: Bucket, fault: StorageFault) -> None:
    for shard in range(SHARDS):
        bucket.faults(f"{shard:03d}.tar", fault)


def test_a_killed_worker_is_replaced_in_the_run(lab: Lab, undisturbed: Callable[..., Record]) -> None:
    """Row 16."""
    ended = lab.finish("r", *WORKERS, plan=[Fault("step", "kill_workers", rank=1, step=4)])
    assert "killed by signal 9. Starting the workers again" in ended.text
    compare(undisturbed(), lab.record("r"))


def test_without_another_worker_the_run_ends(lab: Lab) -> None:
    """Negative control of row 16."""
    never = Fault("new_workers", "fail", rank=1, call=1, with_={"text": "no further worker"})
    ended = lab.run("r", *WORKERS, plan=[Fault("step", "kill_workers", rank=1, step=4), never])
    assert 0 not in ended.codes


def test_a_worker_without_memory_is_replaced_or_ends_the_run(lab: Lab) -> None:
    """Row 17: no deadlock, and nothing is left out in silence."""
    began = time.monotonic()
    starved = Fault("step", "limit_worker_memory", rank=1, step=2, with_={"size": 0})
    ended = lab.run("r", *WORKERS, "--epochs", "2", plan=[starved], timeout_s=40)
    assert time.monotonic() - began < 40
    if ended.codes != [0, 0]:
        assert "memory" in ended.text


STORAGE_FAULTS = {
    "503": StorageFault(times=2, status=503, code="SlowDown"),
    "500": StorageFault(times=1, status=500),
    "reset": StorageFault(times=2, reset_at=1500),
    "short": StorageFault(times=2, short_at=1500),
}


@pytest.mark.parametrize("kind", STORAGE_FAULTS)
def test_storage_that_recovers_changes_nothing(
    lab: Lab, undisturbed: Callable[..., Record], bucket: Bucket, kind: str
) -> None:
    """Rows 23 and 24: samples, losses and weights are those of local files."""
    _fail_all(bucket, STORAGE_FAULTS[kind])
    lab.finish("r", *_from(bucket))
    compare(undisturbed(), lab.record("r"))


def test_without_another_attempt_a_fault_of_the_storage_costs_samples(
    lab: Lab, undisturbed: Callable[..., Record], bucket: Bucket
) -> None:
    """Negative control of rows 23 and 24."""
    _fail_all(bucket, StorageFault(times=2, after=1, reset_at=1500))
    ended = lab.run("r", *_from(bucket), plan=[Fault("retry", "give_up")])
    if ended.codes == [0, 0]:
        with pytest.raises(Disagreement):
            compare(undisturbed(), lab.record("r"))


def test_denied_access_ends_both_ranks_at_once(lab: Lab, bucket: Bucket) -> None:
    """Row 25, under two ranks: never an empty shard."""
    _fail_all(bucket, StorageFault(after=8, status=403, code="AccessDenied"))
    began = time.monotonic()
    ended = lab.run("r", *_from(bucket), "--epochs", "20")
    assert time.monotonic() - began < 30
    assert 0 not in ended.codes
    assert "may not be read" in ended.text
