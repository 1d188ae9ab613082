"""Rows 16, 17 and 23 to 25 end to end: workers and storage that fail under two ranks. tests/data has the other rows."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.factories import write_tar
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


@pytest.fixture
def large_images(tmp_path: Path) -> str:
    """Shards with some images that take 52 MB when they are decoded: more than malloc keeps for the next one."""
    large, small = _png(3600), _png(20)
    directory = tmp_path / "large"
    directory.mkdir()
    for shard in range(SHARDS):
        samples = [
            (f"{shard}-{index}", {"png": large if index % 8 == 0 else small, "txt": b"a photo"}) for index in range(24)
        ]
        write_tar(directory / f"{shard:03d}.tar", samples)
    return f"{directory}/{{000..{SHARDS - 1:03d}}}.tar"


def _png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 120, 7)).save(buffer, "PNG")
    return buffer.getvalue()


NO_MEMORY = Fault("step", "limit_worker_memory", rank=1, step=2, with_={"size": -(1 << 26)})


def test_a_worker_that_may_take_no_more_memory_is_replaced(lab: Lab, large_images: str) -> None:
    """Row 17: no deadlock, and no sample is left out."""
    flags = [*WORKERS, "--train-data", large_images, "--train-num-samples", "96"]
    lab.finish("undisturbed", *flags)
    ended = lab.finish("r", *flags, plan=[NO_MEMORY])
    assert "out of memory. Starting the workers again" in ended.text
    compare(lab.record("undisturbed"), lab.record("r"))


def test_without_another_worker_a_lack_of_memory_ends_the_run(lab: Lab, large_images: str) -> None:
    """Negative control of row 17."""
    never = Fault("new_workers", "fail", rank=1, call=1, with_={"text": "no further worker"})
    flags = [*WORKERS, "--train-data", large_images, "--train-num-samples", "96"]
    assert 0 not in lab.run("r", *flags, plan=[NO_MEMORY, never]).codes


STORAGE_FAULTS = {
    "503": StorageFault(times=2, status=503, code="SlowDown"),
    "reset": StorageFault(times=2, reset_at=1500),
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
