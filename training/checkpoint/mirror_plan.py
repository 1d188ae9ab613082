"""Decides what of a run directory is mirrored, and what may go at the other side: no storage is touched here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from training.checkpoint.manifest import MANIFEST_NAME
from training.checkpoint.mirror_fetch import CHECKPOINTS, files_by_step, step_prefix
from training.checkpoint.mirror_store import RemoteFile

logger = logging.getLogger(__name__)

STATE_NAME = ".mirror.json"
SUPERSEDED = "superseded"
"""What gave way here when the run had gone on elsewhere."""
LEFT_OUT = frozenset({"leases", SUPERSEDED, "trace", "wandb"})
"""Of this machine, both; as large as the data's index, and found again without it; uploaded by its own client."""
_STEP_DIRECTORY = re.compile(r"step_\d{8,}|damaged-step_.*")
_EPOCH_KEY = re.compile(rf"{CHECKPOINTS}/epoch_(\d+)\.pt")
_ALWAYS_BYTES = 16 << 20
_GROWTH = 1.1


class Sent(NamedTuple):
    """What was uploaded under a key: what it was here, and what the listing says of it there."""

    local: str
    """Of a checkpoint's file ``sha256:...``, of any other ``SIZE-TIME``."""
    size: int
    version: str | None


class SentFiles:
    """The uploads that were finished, in ``RUN/.mirror.json``: a run that starts again does not send them again.

    Without the file, or for another URL, everything is sent: a loss costs time and nothing else.
    """

    def __init__(self, run: Path, *, url: str) -> None:
        self._path = run / STATE_NAME
        self._url = url
        self._files: dict[str, Sent] = {}
        try:
            content: dict[str, Any] = json.loads(self._path.read_text())
            if content["url"] == url:
                self._files = {key: Sent(*entry) for key, entry in content["files"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%r): everything is uploaded again.", self._path, error)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._files))

    def get(self, key: str) -> Sent | None:
        """What is known of a key."""
        return self._files.get(key)

    def is_there(self, key: str, local: str, listing: Mapping[str, RemoteFile]) -> bool:
        """Whether exactly this was uploaded, and the listing still shows it."""
        sent = self._files.get(key)
        return sent is not None and sent.local == local and listing.get(key) == RemoteFile(sent.size, sent.version)

    def is_last(self, key: str, listing: Mapping[str, RemoteFile]) -> bool:
        """Whether the listing shows what was uploaded from here, and nothing that somebody else has written since."""
        sent = self._files.get(key)
        return sent is not None and listing.get(key) == RemoteFile(sent.size, sent.version)

    def add(self, key: str, local: str, file: RemoteFile) -> None:
        """An upload is finished."""
        self._files[key] = Sent(local, *file)

    def forget(self, keys: Collection[str]) -> None:
        """Before they are deleted or replaced."""
        for key in keys:
            self._files.pop(key, None)

    def write(self) -> None:
        """Replaces the file; one that cannot be written is no reason to stop."""
        staging = self._path.with_name(f"{STATE_NAME}-{uuid.uuid4().hex[:8]}")
        try:
            staging.write_text(json.dumps({"url": self._url, "files": self._files}) + "\n")
            staging.replace(self._path)
        except OSError as error:
            logger.warning("%s cannot be written (%s).", self._path, error.strerror)
            staging.unlink(missing_ok=True)


def plain_files(run: Path) -> list[Path]:
    """Everything of a run beside its checkpoints, small files first."""
    found: list[tuple[int, Path]] = []
    for folder, folders, names in os.walk(run):
        here = Path(folder)
        top, in_checkpoints = here == run, here == run / CHECKPOINTS
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not (top and name in LEFT_OUT)
            and not (in_checkpoints and _STEP_DIRECTORY.fullmatch(name))
        ]
        for path in (here / name for name in names if not name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):  # deleted just now
                if path.is_file() and not path.is_symlink():
                    found.append((path.stat().st_size, path))
    return [path for _, path in sorted(found)]


def is_history(path: Path) -> bool:
    """Whether a file tells what happened until now, so that it must not be older than a checkpoint beside it."""
    return path.suffix in (".jsonl", ".log", ".yaml", ".txt")


def signature(path: Path) -> str:
    """Changes when a file is written to, or replaced."""
    status = path.stat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def is_due(size: int, sent: Sent | None, *, final: bool) -> bool:
    """Whether a file that has changed is sent again in this round.

    Large files that grow are sent when they have grown by a tenth, so that all uploads together are some ten times the
    file and not its length times the rounds.
    """
    return final or sent is None or size < _ALWAYS_BYTES or not sent.size < size < _GROWTH * sent.size


def whole_lines(path: Path, data: bytes) -> bytes:
    """What a reader of JSON lines can use: the last line may be half written."""
    return data[: data.rfind(b"\n") + 1] if path.suffix == ".jsonl" else data


def keys_to_delete(
    listing: Mapping[str, RemoteFile],
    *,
    local_steps: Collection[int],
    confirmed: Collection[int],
    doomed: Collection[int],
) -> list[list[str]]:
    """Checkpoints that go, each with the key first that makes it one.

    Args:
        local_steps: stay in any case.
        confirmed: are complete at the other side, as we know because we have uploaded or compared them.
        doomed: are given up by retention.
    """
    newest = max((step for step in local_steps if step in confirmed), default=None)
    if newest is None:
        return []
    going = []
    for step, files in files_by_step(listing).items():
        unfinished = MANIFEST_NAME not in files  # and never will be: what is here no more is not uploaded any more
        if step not in local_steps and step < newest and (unfinished or step in doomed):
            going.append([step_prefix(step) + name for name in sorted(files, key=lambda name: name != MANIFEST_NAME)])
    return going


def epoch_files_to_delete(
    listing: Mapping[str, RemoteFile], *, local: Collection[str], sent: Collection[str]
) -> list[str]:
    """``epoch_N.pt`` that we have sent, that was deleted here, and that a later one there has replaced."""
    epochs = {key: int(match[1]) for key in listing if (match := _EPOCH_KEY.fullmatch(key))}
    return [key for key, epoch in epochs.items() if key in sent and key not in local and epoch < max(epochs.values())]
