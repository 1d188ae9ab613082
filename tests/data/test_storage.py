"""Storage as a whole: every kind of URL gives the same bytes, is counted, and costs an import only where it is used."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import fsspec
import pytest

from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.data.storage import Storage, StorageError, StorageOptions, open_shard
from training.data.storage_errors import StorageCounters
from training.data.streams import SeekableStream

DATA = Random(2).randbytes(2_500_000)
QUICK = StorageOptions(first_delay_s=0.01, longest_delay_s=0.02, pipe_timeout_s=0.5)


@pytest.fixture(params=["file", "file://", "pipe", "memory://"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "a b.tar"
    path.write_bytes(DATA)
    if request.param == "memory://":
        with fsspec.open("memory://streams/a.tar", "wb") as file:
            file.write(DATA)
        return "memory://streams/a.tar"
    return {"file": str(path), "file://": f"file://{path}", "pipe": f"pipe:cat '{path}'"}[request.param]


def test_any_url_is_read_from_its_start_or_from_an_offset(url: str) -> None:
    storage = Storage(QUICK)
    for offset in (0, 1, 1_500_000, len(DATA)):
        with storage.open(url, offset=offset) as stream:
            assert stream.offset == offset
            assert stream.read(1000) == DATA[offset : offset + 1000]
            assert stream.read(10_000_000) == DATA[offset + 1000 :]
            assert stream.read(1) == b""
            assert stream.offset == len(DATA)
    assert storage.read_bytes(url) == DATA


def test_skipping_lands_on_the_byte_and_may_pass_the_end(url: str) -> None:
    with open_shard(url) as stream:
        assert stream.read(10) == DATA[:10]
        stream.skip(1_200_000)
        assert stream.offset == 1_200_010
        assert stream.read(10) == DATA[1_200_010:1_200_020]
        stream.skip(10_000_000)
        assert stream.read(10) == b""


def test_bytes_are_counted(url: str) -> None:
    storage = Storage(QUICK)
    storage.read_bytes(url)
    assert storage.counters["bytes_read"] == len(DATA)
    assert storage.counters["retries"] == 0


class _BreakingFile:
    """Fails with an input/output error once in every ``period`` reads."""

    reads = 0
    period = 3

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.seek, self.close, self.fileno = self._file.seek, self._file.close, self._file.fileno

    def read(self, size: int) -> bytes:
        _BreakingFile.reads += 1
        if _BreakingFile.reads % _BreakingFile.period == 0:
            raise OSError(5, "Input/output error")
        return self._file.read(size)


@pytest.mark.parametrize(("period", "good"), [(3, True), (1, False)])
def test_a_file_that_breaks_is_opened_again_at_the_byte_reached(tmp_path: Path, period: int, good: bool) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    _BreakingFile.reads, _BreakingFile.period = 0, period
    counters = StorageCounters()
    path = tmp_path / "a.tar"
    stream = SeekableStream(
        "a.tar", 0, reopen=lambda: _BreakingFile(path), options=replace(QUICK, attempts=3), counters=counters
    )
    if good:
        assert b"".join(stream.read(500_000) for _ in range(5)) == DATA
        assert counters["retries"] == 2
    else:
        with pytest.raises(StorageError, match=r"'a.tar' at byte 0 failed 3 times.*Input/output error"):
            stream.read(1)


def test_a_command_that_hangs_is_run_again_and_then_is_an_error() -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match="failed 4 times.*no output"):
        Storage(replace(QUICK, pipe_timeout_s=0.2)).read_bytes("pipe:printf x; sleep 60")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("lowest", "retries"), [(2e6, 1), (1e3, 0)])
def test_a_trickle_is_dropped_below_the_lowest_speed_and_told_above_it(
    s3: Bucket, caplog: pytest.LogCaptureFixture, lowest: float, retries: int
) -> None:
    """0.9 MB/s; the limit of a whole request is far off."""
    url = s3.put("slow.tar", DATA)
    s3.faults("slow.tar", Fault(times=1, trickle_bytes=256 << 10, trickle_s=0.3))
    storage = Storage(replace(QUICK, low_speed_bytes_per_s=lowest, low_speed_s=0.5, chunk_bytes=1 << 25))
    start = time.monotonic()
    assert storage.read_bytes(url) == DATA
    assert storage.counters["retries"] == retries
    assert (time.monotonic() - start > 2.4) == (retries == 0)
    assert ("slow.tar' comes slowly" in caplog.text) == (retries == 0)


def test_a_copy_command_is_read_natively_unless_that_is_off(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"pipe:aws s3 cp --quiet {s3.put('a.tar', DATA)} -"
    (tmp_path / "aws").write_text("#!/bin/sh\necho the command ran\n")
    (tmp_path / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Storage(QUICK).read_bytes(command) == DATA
    assert Storage(replace(QUICK, s3_native=False)).read_bytes(command) == b"the command ran\n"
    assert Storage(QUICK).read_bytes(f"{command} || true") == b"the command ran\n"


def test_a_storage_pickles_as_its_options() -> None:
    storage = Storage(QUICK)
    storage.read_bytes(__file__)
    assert len(pickle.dumps(storage)) < 1000
    again = pickle.loads(pickle.dumps(storage))
    assert again.options == QUICK
    assert again.counters["bytes_read"] == 0


def test_importing_storage_is_cheap() -> None:
    heavy = ("fsspec", "obstore", "boto3", "botocore", "torch", "aiohttp")
    code = f"import sys, training.data.storage; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
