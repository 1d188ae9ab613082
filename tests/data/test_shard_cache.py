"""The local cache of remote shards serves what is right, whatever happens to its files, its disk and its processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.data.storage import Storage, StorageOptions

MIB = 1 << 20
DATA = Random(1).randbytes(3 * MIB + 4321)
SMALL_GIB = 10 * MIB / 2**30


def _storage(directory: Path, *, gib: float = 1.0) -> Storage:
    return Storage(StorageOptions(cache_dir=str(directory), cache_gib=gib, chunk_bytes=MIB, first_delay_s=0.01))


def _read(storage: Storage, url: str, *, offset: int = 0) -> bytes:
    with storage.open(url, offset=offset) as stream:
        return stream.read(64 * MIB)


def _copies(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.shard"))


def _partial(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.partial"))


def _age(directory: Path) -> None:
    """Makes all copies look as if they had been used a minute earlier."""
    for copy in _copies(directory):
        os.utime(copy, (copy.stat().st_mtime - 60,) * 2)


@pytest.fixture
def url(s3: Bucket) -> str:
    return s3.put("a.tar", DATA)


def test_a_shard_is_fetched_once_and_survives_a_restart(s3: Bucket, url: str, tmp_path: Path) -> None:
    first, second = _storage(tmp_path), _storage(tmp_path)
    assert _read(first, url) == DATA
    s3.delete("a.tar")
    assert _read(second, url) == DATA
    assert _read(second, url, offset=MIB + 5) == DATA[MIB + 5 :]
    assert (first.counters["cache_misses"], first.counters["cache_hits"]) == (1, 0)
    assert (second.counters["cache_misses"], second.counters["cache_hits"]) == (0, 2)
    assert second.counters["bytes_read"] == second.counters["requests"] == 0


def test_reading_in_pieces_and_skipping_keeps_the_whole_shard(url: str, tmp_path: Path) -> None:
    with _storage(tmp_path).open(url) as stream:
        assert stream.read(700_001) == DATA[:700_001]
        stream.skip(2 * MIB)
        assert stream.offset == 700_001 + 2 * MIB
        assert stream.read(10 * MIB) == DATA[700_001 + 2 * MIB :]
    with _storage(tmp_path).open(url) as stream:
        assert stream.read(5) == DATA[:5]
        stream.skip(2 * MIB)
        assert stream.read(10 * MIB) == DATA[5 + 2 * MIB :]
        assert stream.read(1) == b""


def test_the_padding_of_a_tar_need_not_be_read_by_the_reader(s3: Bucket, tmp_path: Path) -> None:
    url = s3.put("padded.tar", DATA + bytes(10_240))
    with _storage(tmp_path).open(url) as stream:
        stream.read(len(DATA))
    assert _read(_storage(tmp_path), url) == DATA + bytes(10_240)
    assert len(_copies(tmp_path)) == 1


@pytest.mark.parametrize("offset", [0, 100])
def test_what_was_not_read_as_a_whole_is_not_kept(url: str, tmp_path: Path, offset: int) -> None:
    with _storage(tmp_path).open(url, offset=offset) as stream:
        stream.read(MIB if offset == 0 else 64 * MIB)
    assert _copies(tmp_path) == _partial(tmp_path) == []


def test_a_shard_that_breaks_off_is_not_kept(s3: Bucket, url: str, tmp_path: Path) -> None:
    s3.faults("a.tar", Fault(after=2, status=403, code="AccessDenied"))
    with pytest.raises(RuntimeError, match="may not be read"):
        _read(_storage(tmp_path), url)
    assert _copies(tmp_path) == _partial(tmp_path) == []


@pytest.mark.parametrize("place", [10, 2 * MIB + 10, len(DATA) - 1])
def test_a_damaged_copy_is_left_at_the_damage_and_read_on_remotely(
    url: str, tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    _read(_storage(tmp_path), url)
    with _copies(tmp_path)[0].open("r+b") as file:
        file.seek(place)
        file.write(bytes([DATA[place] ^ 1]))
    storage = _storage(tmp_path)
    assert _read(storage, url) == DATA
    assert storage.counters["cache_damaged"] == 1
    assert storage.counters["bytes_read"] == len(DATA) - place // MIB * MIB
    assert "is damaged" in caplog.text
    assert _copies(tmp_path) == []
    assert _read(storage, url) == DATA
    assert len(_copies(tmp_path)) == 1


@pytest.mark.parametrize("size", [0, 7, MIB, len(DATA), len(DATA) + 20])
def test_a_cut_copy_is_never_served(url: str, tmp_path: Path, size: int) -> None:
    _read(_storage(tmp_path), url)
    os.truncate(_copies(tmp_path)[0], size)
    storage = _storage(tmp_path)
    assert _read(storage, url) == DATA
    assert (storage.counters["cache_damaged"], storage.counters["bytes_read"]) == (1, len(DATA))


def test_a_copy_of_another_shard_is_never_served(s3: Bucket, url: str, tmp_path: Path) -> None:
    _read(_storage(tmp_path), url)
    other = s3.put("b.tar", DATA[::-1])
    _read(_storage(tmp_path / "other"), other)
    _copies(tmp_path)[0].rename(tmp_path / _copies(tmp_path / "other")[0].name)
    assert _read(_storage(tmp_path), other) == DATA[::-1]


def test_the_shards_unused_for_longest_make_room(s3: Bucket, tmp_path: Path) -> None:
    urls = [s3.put(f"{number}.tar", DATA) for number in range(5)]
    storage = _storage(tmp_path, gib=SMALL_GIB)  # room for three
    for url in urls[:2]:
        _read(storage, url)
        _age(tmp_path)
    _read(storage, urls[0])  # used again: the other one is the oldest now
    for url in urls[2:]:
        _read(storage, url)
        assert sum(copy.stat().st_size for copy in _copies(tmp_path)) <= SMALL_GIB * 2**30
    again = _storage(tmp_path, gib=SMALL_GIB)
    _read(again, urls[4])
    _read(again, urls[1])
    assert (again.counters["cache_hits"], again.counters["cache_misses"]) == (1, 1)


def test_a_shard_that_is_removed_while_it_is_read_is_read_to_its_end(s3: Bucket, url: str, tmp_path: Path) -> None:
    storage = _storage(tmp_path, gib=SMALL_GIB)
    _read(storage, url)
    with storage.open(url) as stream:
        begin = stream.read(1000)
        for number in range(4):
            _read(storage, s3.put(f"{number}.tar", DATA))
        assert begin + stream.read(64 * MIB) == DATA
    assert storage.counters["cache_hits"] == 1
    assert storage.counters["cache_damaged"] == 0


def test_a_shard_larger_than_the_cache_is_only_read(url: str, tmp_path: Path) -> None:
    assert _read(_storage(tmp_path, gib=MIB / 2**30), url) == DATA
    assert _copies(tmp_path) == []


def test_an_unwritable_cache_is_told_once_and_does_without(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    storage = _storage(tmp_path / "file" / "cache")
    assert _read(storage, url) == _read(storage, url) == DATA
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "not kept" in caplog.text
    assert "--cache-shards" in caplog.text


_READER = """
import hashlib, json, logging, resource, sys
logging.basicConfig(level=logging.WARNING)
from training.data.storage import Storage, StorageOptions
directory, limit, *urls = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
storage = Storage(StorageOptions(cache_dir=directory, chunk_bytes=1 << 20))
digests = []
for url in urls:
    with storage.open(url) as stream:
        digest = hashlib.sha256()
        while data := stream.read(300_000):
            digest.update(data)
    digests.append(digest.hexdigest())
print(json.dumps([digests, dict(storage.counters)]))
"""


def _reader(directory: Path, urls: list[str], *, file_limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _READER, str(directory), str(file_limit), *urls]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_told_once_and_does_not_stop_reading(s3: Bucket, tmp_path: Path) -> None:
    urls = [s3.put(f"{number}.tar", DATA) for number in range(3)]
    full, errors = _reader(tmp_path, urls, file_limit=2 * MIB).communicate(timeout=30)
    enough, _ = _reader(tmp_path / "enough", urls).communicate(timeout=30)
    assert json.loads(full)[0] == json.loads(enough)[0]
    assert errors.count("not kept") == 1
    assert _copies(tmp_path) == _partial(tmp_path) == []
    assert len(_copies(tmp_path / "enough")) == 3


def test_processes_at_once_share_the_cache_and_all_read_right(s3: Bucket, tmp_path: Path) -> None:
    urls = [s3.put(f"{number}.tar", DATA[number:]) for number in range(4)]
    readers = [_reader(tmp_path, urls[turn:] + urls[:turn] + urls) for turn in range(4)]
    digests = []
    for turn, reader in enumerate(readers):
        output, errors = reader.communicate(timeout=60)
        assert errors == ""
        read = json.loads(output)[0]
        digests.append(read[4 - turn : 4] + read[: 4 - turn] + read[4:])
    assert digests == [digests[0]] * 4
    assert digests[0][:4] == digests[0][4:]
    assert len(set(digests[0])) == 4
    assert len(_copies(tmp_path)) == 4
    assert _partial(tmp_path) == []


def test_what_a_killed_process_left_behind_is_replaced(s3: Bucket, url: str, tmp_path: Path) -> None:
    s3.faults("a.tar", Fault(times=1, after=1, stall_at=300_000, stall_s=30))
    killed = _reader(tmp_path, [url])
    while not _partial(tmp_path):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    s3.faults("a.tar")
    assert len(_partial(tmp_path)) == 1
    assert _read(_storage(tmp_path), url) == DATA
    assert _partial(tmp_path) == []
    assert _read(_storage(tmp_path), url) == DATA
    assert len(_copies(tmp_path)) == 1


def test_shards_of_any_protocol_are_kept_but_not_commands(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://cache-test/a.tar", "wb") as file:
        file.write(DATA)
    (tmp_path / "local.tar").write_bytes(DATA)
    storage = _storage(tmp_path / "cache")
    for url in ("memory://cache-test/a.tar", f"pipe:cat {tmp_path / 'local.tar'}", str(tmp_path / "local.tar")):
        assert _read(storage, url) == _read(storage, url) == DATA
    assert (storage.counters["cache_misses"], storage.counters["cache_hits"]) == (1, 1)
