from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from training.data.storage import AccessDenied, ShardChanged, ShardMissing, Storage, StorageError, StorageOptions

DATA = bytes(range(256)) * 4000  # 1 MB
QUICK = StorageOptions(attempts=4, first_delay_s=0.02, longest_delay_s=0.1, pipe_timeout_s=20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    return path


def _fails_first(file: Path, command: str, *, good: str = "cat {file}") -> str:
    """A pipe whose first run is ``command`` and whose later ones are ``good``."""
    mark = file.with_suffix(".ran")
    first, later = (text.format(file=shlex.quote(str(file))) for text in (command, good))
    return f"pipe:if [ -e {mark} ]; then {later}; else touch {mark}; {first}; fi"


@pytest.mark.parametrize("prefix", ["", "file://", "pipe:cat "])
@pytest.mark.parametrize("offset", [0, 1, 70_000, len(DATA)])
def test_files_and_pipes_are_read_from_any_offset_with_skips(file: Path, prefix: str, offset: int) -> None:
    storage = Storage(QUICK)
    with storage.open(f"{prefix}{file}", offset=offset) as stream:
        first = stream.read(100)
        stream.skip(50_000)
        rest = stream.read(len(DATA))
        assert first == DATA[offset : offset + 100]
        assert rest == DATA[offset + 50_100 :]
        assert stream.read(10) == b""
    assert storage.counters["retries"] == 0
    assert storage.counters["bytes_read"] >= len(first + rest)


@pytest.mark.parametrize("first", ["head -c 300000 {file}; exit 1", "exit 3", "head -c 300000 {file}; kill -9 $$"])
def test_a_command_that_fails_is_run_again_and_no_byte_comes_twice(file: Path, first: str) -> None:
    storage = Storage(QUICK)
    assert storage.read_bytes(_fails_first(file, first)) == DATA
    assert storage.counters["retries"] == 1


def test_a_silent_command_is_ended_and_run_again(file: Path) -> None:
    url = _fails_first(file, "head -c 300000 {file}; sleep 77.7")
    assert Storage(replace(QUICK, pipe_timeout_s=1)).read_bytes(url) == DATA
    assert subprocess.run(["pgrep", "-f", "^sleep 77.7"], capture_output=True).stdout == b""


def test_a_command_that_gives_less_the_second_time_is_another_shard(file: Path) -> None:
    url = _fails_first(file, "head -c 300000 {file}; exit 1", good="head -c 1000 {file}")
    with pytest.raises(ShardChanged, match="ended at byte 1000, and 300000 bytes had been read"):
        Storage(QUICK).read_bytes(url)


def test_a_command_that_keeps_failing_is_reported_with_what_it_said() -> None:
    with pytest.raises(StorageError, match=r"failed 4 times .*status 5: the disk is on fire") as caught:
        Storage(QUICK).read_bytes("pipe:echo the disk is on fire >&2; exit 5")
    assert type(caught.value) is StorageError


@pytest.mark.parametrize(
    ("says", "error"),
    [
        ("fatal error: An error occurred (403) when calling the HeadObject operation: Forbidden", AccessDenied),
        ("fatal error: Unable to locate credentials", AccessDenied),
        ("An error occurred (ExpiredToken) when calling the GetObject operation", AccessDenied),
        ("curl: (22) The requested URL returned error: 403", AccessDenied),
        ("fatal error: An error occurred (404) when calling the HeadObject operation: Key 403.tar", ShardMissing),
        ("curl: (22) The requested URL returned error: 404", ShardMissing),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(says: str, error: type[StorageError]) -> None:
    storage = Storage(QUICK)
    with pytest.raises(error, match="ended with status 1"):
        storage.read_bytes(f"pipe:echo {shlex.quote(says)} >&2; exit 1")
    assert storage.counters["retries"] == 0


def test_an_unknown_command_is_the_users_to_correct() -> None:
    with pytest.raises(ValueError, match=r"no-such-command.*Install the command, or correct its name"):
        Storage(QUICK).read_bytes("pipe:no-such-command s3://b/k")


def test_closing_ends_everything_that_the_command_has_started() -> None:
    with Storage(QUICK).open("pipe:sleep 66.6 | yes | cat") as stream:
        stream.read(10)
    assert subprocess.run(["pgrep", "-f", "^sleep 66.6"], capture_output=True).stdout == b""


def test_missing_and_unreadable_files_are_told_apart(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ShardMissing, match="does not exist: correct its name"):
        Storage(QUICK).read_bytes(str(tmp_path / "none.tar"))
    with pytest.raises(ValueError, match="cannot be opened: .*[Dd]irectory"):
        Storage(QUICK).read_bytes(str(tmp_path))
    file.chmod(0)
    if not os.access(file, os.R_OK):  # root reads everything
        with pytest.raises(AccessDenied, match="may not be read"):
            Storage(QUICK).read_bytes(str(file))


def test_other_protocols_go_through_fsspec() -> None:
    import fsspec

    with fsspec.open("memory://d/a.tar", "wb") as file:
        file.write(DATA)
    storage = Storage(QUICK)
    with storage.open("memory://d/a.tar", offset=10) as stream:
        stream.skip(10)
        assert stream.read(len(DATA)) == DATA[20:]
        assert stream.size == len(DATA)
    with pytest.raises(ShardMissing, match="does not exist"):
        storage.read_bytes("memory://d/none.tar")
    with pytest.raises(ValueError, match="cannot be opened: .*nosuch"):
        storage.read_bytes("nosuch://d/a.tar")


def test_a_pipe_is_no_obstacle_to_signals() -> None:
    """Ctrl-C reaches the reader while a command is silent; the command ends with it."""
    code = "from training.data.storage import Storage; print(1, flush=True); Storage().read_bytes('pipe:sleep 55.5')"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=40) != 0  # below the command's own 55 s
    process.stdout.close()
    assert subprocess.run(["pgrep", "-f", "^sleep 55.5"], capture_output=True).stdout == b""
