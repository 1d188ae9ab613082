"""Reading from S3 and web servers that misbehave; the server is a process of its own, see tests/s3/server.py."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.data.storage import AccessDenied, ShardChanged, ShardMissing, Storage, StorageError, StorageOptions

CHUNK = 1 << 20
DATA = Random(0).randbytes(3 * CHUNK + 12345)
QUICK = StorageOptions(
    attempts=4,
    first_delay_s=0.02,
    longest_delay_s=0.1,
    connect_timeout_s=2,
    read_timeout_s=1,
    chunk_bytes=CHUNK,
    chunks_ahead=1,
)


def _read(storage: Storage, url: str, *, offset: int = 0, step: int = 100_000) -> bytes:
    with storage.open(url, offset=offset) as stream:
        parts = []
        while part := stream.read(step):
            parts.append(part)
            assert stream.offset == offset + sum(map(len, parts))
        return b"".join(parts)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.fixture
def url(s3: Bucket) -> str:
    return s3.put("a.tar", DATA)


@pytest.mark.parametrize(
    ("fault", "retries"),
    [
        (Fault(times=3, status=503, code="SlowDown"), 3),
        (Fault(times=2, status=500, code="InternalError"), 2),
        (Fault(times=1, reset_at=700_000), 1),
        (Fault(times=1, after=2, reset_at=0), 1),
        (Fault(times=1, short_at=700_000), 1),
        (Fault(times=1, after=1, stall_at=300_000), 1),
        (Fault(times=1, stall_at=0), 1),
    ],
    ids=["503", "500", "reset", "reset-at-once", "short", "stall", "stall-at-once"],
)
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_what_breaks_goes_on_at_the_byte_reached(s3: Bucket, url: str, scheme: str, fault: Fault, retries: int) -> None:
    s3.faults("a.tar", fault)
    storage = Storage(QUICK)
    with _at_most(5):
        data = _read(storage, url if scheme == "s3" else s3.http_url("a.tar"))
    assert data == DATA
    assert storage.counters["retries"] == retries
    assert storage.counters["bytes_read"] == len(DATA)
    assert storage.counters["requests"] == 4 + retries
    assert sum(request.sent for request in s3.log("a.tar") if request.status == 206) <= len(DATA) + CHUNK


def test_an_undisturbed_read_asks_once_per_chunk(s3: Bucket, url: str) -> None:
    """The negative control of the test above."""
    storage = Storage(QUICK)
    assert _read(storage, url) == DATA
    assert storage.counters["retries"] == 0
    assert storage.counters["requests"] == len(s3.log("a.tar")) == 4
    assert {request.credential for request in s3.log("a.tar")} == {"test-key"}


def test_a_server_that_never_recovers_ends_the_reading_with_url_byte_and_attempts(s3: Bucket, url: str) -> None:
    s3.faults("a.tar", Fault(after=1, status=503, code="SlowDown"))
    with _at_most(5), pytest.raises(StorageError, match=r"a\.tar' at byte 1048576 failed 4 times .*SlowDown") as caught:
        _read(Storage(QUICK), url)
    assert type(caught.value) is StorageError


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (400, "ExpiredToken"), (401, "Unauthorized")],
)
@pytest.mark.parametrize("first", [0, 2])
def test_denied_access_is_told_at_once(s3: Bucket, url: str, status: int, code: str, first: int) -> None:
    s3.faults("a.tar", Fault(after=first, status=status, code=code))
    storage = Storage(QUICK)
    with _at_most(3), pytest.raises(AccessDenied, match=rf"a\.tar' may not be read.*{code}.*credentials"):
        _read(storage, url)
    assert storage.counters["retries"] == 0


def test_without_any_credentials_the_message_says_how_to_give_some(
    s3: Bucket, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with _at_most(10), pytest.raises(AccessDenied, match=r"No credentials .*AWS_ACCESS_KEY_ID.*AWS_NO_SIGN_REQUEST"):
        _read(Storage(QUICK), url)
    assert s3.log("a.tar") == []


def test_public_data_are_read_unsigned(s3: Bucket, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert _read(Storage(QUICK), f"pipe:aws s3 cp --no-sign-request {url} -") == DATA
    assert {request.credential for request in s3.log("a.tar")} == {""}


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_missing_object_is_told_at_once(s3: Bucket, scheme: str) -> None:
    storage = Storage(QUICK)
    with _at_most(3), pytest.raises(ShardMissing, match=r"none\.tar' does not exist"):
        _read(storage, s3.url("none.tar") if scheme == "s3" else s3.http_url("none.tar"))
    assert storage.counters["requests"] == 1


@pytest.mark.parametrize("ignore_if_match", [False, True])
@pytest.mark.parametrize("length", [len(DATA), len(DATA) - 7])
def test_an_object_that_changes_gives_no_byte_of_the_new_one(
    s3: Bucket, url: str, length: int, ignore_if_match: bool
) -> None:
    s3.put("new.tar", DATA[::-1][:length])
    s3.faults("a.tar", Fault(after=1, replace_with=f"/{s3.name}/new.tar", ignore_if_match=ignore_if_match))
    read = []
    with Storage(QUICK).open(url) as stream:

        def read_on() -> None:
            while part := stream.read(100_000):
                read.append(part)

        with pytest.raises(ShardChanged, match=r"a\.tar' changed while it was read"):
            read_on()
    assert DATA.startswith(b"".join(read))


def test_a_change_seen_only_after_a_break_is_found_as_well(s3: Bucket, url: str) -> None:
    s3.put("new.tar", DATA[::-1])
    s3.faults("a.tar", Fault(times=1, reset_at=500_000), Fault(times=1, replace_with=f"/{s3.name}/new.tar"))
    with pytest.raises(ShardChanged, match="changed while it was read"):
        _read(Storage(replace(QUICK, chunk_bytes=1 << 26)), url)


def test_a_slow_object_is_read_to_its_end(s3: Bucket) -> None:
    """64 kB every 0.05 s: no timeout without a byte, and far above the speed at which a request is dropped."""
    url = s3.put("slow.tar", DATA[:CHUNK])
    s3.faults("slow.tar", Fault(times=1, trickle_bytes=64 << 10, trickle_s=0.05))
    assert _read(Storage(QUICK), url) == DATA[:CHUNK]


def test_a_request_below_the_lowest_speed_is_dropped_and_goes_on_elsewhere(s3: Bucket) -> None:
    url = s3.put("slow.tar", DATA[:CHUNK])
    s3.faults("slow.tar", Fault(times=1, trickle_bytes=8 << 10, trickle_s=0.2))  # 26 s at this speed
    storage = Storage(replace(QUICK, low_speed_bytes_per_s=1e6, low_speed_s=1.0))
    with _at_most(15):
        assert _read(storage, url) == DATA[:CHUNK]
    assert storage.counters["retries"] >= 1


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_objects_of_any_size_are_whole(s3: Bucket, scheme: str, size: int) -> None:
    url = s3.put("x.tar", DATA[:size])
    storage = Storage(QUICK)
    with storage.open(url if scheme == "s3" else s3.http_url("x.tar")) as stream:
        assert stream.read(10 * CHUNK) == DATA[:size]
        assert stream.read(1) == b""
        assert stream.size == size


@pytest.mark.parametrize("offset", [1, CHUNK - 1, CHUNK, len(DATA) - 1, len(DATA)])
def test_reading_begins_at_the_offset_and_fetches_nothing_before_it(s3: Bucket, url: str, offset: int) -> None:
    storage = Storage(QUICK)
    assert _read(storage, url, offset=offset) == DATA[offset:]
    assert storage.counters["bytes_read"] == len(DATA) - offset


def test_an_offset_beyond_the_end_is_another_object(s3: Bucket, url: str) -> None:
    with pytest.raises(ShardChanged, match="was read from byte"):
        _read(Storage(QUICK), url, offset=len(DATA) + 1)


def test_what_is_skipped_is_not_fetched(s3: Bucket) -> None:
    url = s3.put("large.tar", DATA * 8)
    storage = Storage(QUICK)
    with storage.open(url) as stream:
        assert stream.read(10) == DATA[:10]
        stream.skip(7 * len(DATA) - 10)
        assert stream.offset == 7 * len(DATA)
        assert stream.read(1000) == DATA[:1000]
        stream.skip(5)
        assert stream.read(10) == DATA[1005:1015]
    assert s3.bytes_sent("large.tar") <= 5 * CHUNK < len(DATA * 8)


@pytest.mark.parametrize("key", ["a b.tar", "a+b.tar", "é.tar", "a%41.tar", "a=b&c.tar", "a#b.tar", "x/00416.tar"])
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_names_with_unusual_characters_are_found(s3: Bucket, scheme: str, key: str) -> None:
    url = s3.put(key, b"content")
    assert Storage(QUICK).read_bytes(url if scheme == "s3" else s3.http_url(key)) == b"content"


def test_many_streams_at_once_are_counted_exactly(s3: Bucket, url: str) -> None:
    storage = Storage(replace(QUICK, chunk_bytes=32 << 10, chunks_ahead=4))
    with storage.open(url) as first, storage.open(url) as second, storage.open(url) as third:
        for _ in range(200):
            assert first.read(20_000) == second.read(20_000) == third.read(20_000)
    assert storage.counters["bytes_read"] == 3 * len(DATA)
    assert storage.counters["requests"] == len(s3.log("a.tar"))


_READ_PICKLED = (
    "import pickle, sys; storage = pickle.load(sys.stdin.buffer); "
    "print(len(storage.read_bytes(sys.argv[1])), storage.counters['requests'])"
)


def test_a_storage_that_was_used_works_in_a_fresh_process(url: str) -> None:
    storage = Storage(QUICK)
    _read(storage, url)
    done = subprocess.run(
        [sys.executable, "-c", _READ_PICKLED, url], input=pickle.dumps(storage), capture_output=True, check=True
    )
    assert done.stdout.split() == [str(len(DATA)).encode(), b"4"]


_FORK_AFTER_USE = """
import os, sys
from training.data.storage import Storage
Storage().read_bytes(sys.argv[1])
if os.fork() == 0:
    try:
        Storage().read_bytes(sys.argv[1])
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""


def test_a_process_forked_after_use_is_told_so_and_does_not_hang(url: str) -> None:
    done = subprocess.run([sys.executable, "-c", _FORK_AFTER_USE, url], capture_output=True, timeout=30, check=True)
    assert b"was forked from process" in done.stdout


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[str]:
    """Python's own web server, which knows no ranges."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().partition("(")[2].partition("/)")[0]
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("size", [0, 10, len(DATA)])
def test_a_server_without_ranges_is_read_from_the_start(plain_server: str, tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(DATA[:size])
    assert _read(Storage(QUICK), f"{plain_server}/a.tar") == DATA[:size]
    assert _read(Storage(QUICK), f"{plain_server}/a.tar", offset=size // 2) == DATA[size // 2 : size]


def test_a_profile_in_the_home_directory_gives_keys_endpoint_and_region(
    s3: Bucket, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[team]\naws_access_key_id = team-key\naws_secret_access_key = s\n")
    (tmp_path / ".aws" / "config").write_text(f"[profile team]\nregion = eu-west-1\nendpoint_url = {s3.endpoint}\n")
    assert _read(Storage(QUICK), f"pipe:aws s3 cp {url} - --profile team") == DATA
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert _read(Storage(QUICK), url) == DATA
    assert {request.credential for request in s3.log("a.tar")} == {"team-key"}
    monkeypatch.setenv("AWS_PROFILE", "typo")
    with pytest.raises(AccessDenied, match="no AWS profile 'typo'"):
        _read(Storage(QUICK), url)


def test_moto_serves_signed_requests_of_ours_and_of_boto3_alike(s3: Bucket) -> None:
    """The only test through somebody else's S3: uploads by boto3, reads by us, a break on the way."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket=f"moto-{s3.name}")
    client.put_object(Bucket=f"moto-{s3.name}", Key="d/a b.tar", Body=DATA)
    bucket = Bucket(s3.server, f"moto-{s3.name}")
    bucket.faults("d/a b.tar", Fault(times=1, reset_at=500_000), Fault(times=1, status=503, code="SlowDown"))
    storage = Storage(QUICK)
    assert _read(storage, bucket.url("d/a b.tar")) == DATA
    assert _read(storage, bucket.url("d/a b.tar"), offset=len(DATA) - 5) == DATA[-5:]
    assert storage.counters["retries"] == 2
    assert all(request.credential == "test-key" for request in bucket.log("d/a b.tar") if request.method == "GET")
    with pytest.raises(ShardMissing, match="does not exist"):
        storage.read_bytes(bucket.url("d/none.tar"))
    client.put_object(Bucket=f"moto-{s3.name}", Key="empty", Body=b"")
    assert storage.read_bytes(bucket.url("empty")) == b""


def test_the_environment_is_read_when_a_shard_is_opened(s3: Bucket, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(QUICK)
    _read(storage, url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "rotated-key")
    _read(storage, url)
    assert {request.credential for request in s3.log("a.tar")} == {"test-key", "rotated-key"}
    assert os.environ["AWS_ACCESS_KEY_ID"] == "rotated-key"
