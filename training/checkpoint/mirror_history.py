"""Brings the history of a run back from its mirror, and tells whose history counts where two directories have one.

The starts of a run, in ``starts.jsonl``, are only ever added to. If those of the mirror are the beginning of ours, and
no newer checkpoint is there, the mirror was made here: what is here is newer and stays. Otherwise another directory has
gone on with the run: what is there counts, and what is here goes to ``RUN/superseded/TIME/``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from training.checkpoint.checkpointer import LATEST_NAME, Checkpointer, new_token
from training.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, read_manifest
from training.checkpoint.mirror_fetch import (
    CHECKPOINTS,
    EPOCH_KEY,
    MARK_NAME,
    RemoteRun,
    files_by_step,
    is_step_key,
)
from training.checkpoint.mirror_plan import SUPERSEDED, SentFiles
from training.checkpoint.mirror_store import RemoteFile
from training.checkpoint.tags import TAGS_NAME, Tags
from training.data.storage_errors import StorageError
from training.naming import STARTS_FILE

logger = logging.getLogger(__name__)

LEDGERS = frozenset({STARTS_FILE, "events.jsonl"})
"""Lines are only ever added to these, so that a later version begins with every earlier one."""
_TAGS_KEY = f"{CHECKPOINTS}/{TAGS_NAME}"
_HINT_KEY = f"{CHECKPOINTS}/{LATEST_NAME}"
_BLOCK_BYTES = 1 << 20


class History(NamedTuple):
    """What was brought back."""

    fetched: list[str]
    aside: Path | None
    """Where the local files lie that gave way, if any did."""


def fetch_history(remote: RemoteRun, run: Path) -> History:
    """Brings logs, metrics, events, starts and tags, so that a run's history goes on. Nothing here is lost.

    Checkpoints and ``.pt`` files are not fetched; those that another directory has written anew since give way.
    Killed half way and called again, it comes to the same end: the starts, which decide, come last.
    """
    listing = remote.listing()
    superseded = Superseded(run)
    overtaken = is_overtaken(remote, run, listing)
    if overtaken:
        _put_checkpoints_aside(remote, run, listing, superseded)
        _merge_tags(remote, run, listing)
    fetched = []
    wanted = (key for key in listing if not (is_step_key(key) or EPOCH_KEY.fullmatch(key) or _is_private(key)))
    for key in sorted(wanted, key=lambda key: (key == STARTS_FILE, key)):
        target = run / key
        if not target.resolve().is_relative_to(run.resolve()):
            raise StorageError(f"{remote.store.url}/{key} would be written outside of {run}: it is no mirror of ours.")
        missing = not target.exists()
        replaceable = overtaken and target.is_file() and key not in (_TAGS_KEY, _HINT_KEY)
        if (missing or replaceable) and _fetch(remote, key, target, superseded):
            fetched.append(key)
    if superseded.used:
        logger.warning(
            "%s was continued from another directory: its history counts. What was here is in %s.",
            *(remote.store.url, superseded.directory),
        )
    return History(fetched, superseded.directory if superseded.used else None)


def is_overtaken(remote: RemoteRun, run: Path, listing: Mapping[str, RemoteFile]) -> bool:
    """Whether another directory has gone on with the run since this one did."""
    if STARTS_FILE in listing and not knows_starts(run, remote.read(STARTS_FILE)):
        return True
    away = [step for step, files in files_by_step(listing).items() if MANIFEST_NAME in files]
    return max(away, default=-1) > max(Checkpointer(run / CHECKPOINTS).steps(), default=-1)


def knows_starts(run: Path, starts: bytes) -> bool:
    """Whether the starts of this directory begin with those of a mirror."""
    return _read(run / STARTS_FILE).startswith(starts)


class Superseded:
    """Where local files go that give way; made when it is needed."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.directory = run / SUPERSEDED / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{new_token()}"
        self.used = False

    def take(self, path: Path) -> None:
        """Moves a file, or the directory of a checkpoint."""
        target = self.directory / path.relative_to(self._run)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        self.used = True


def _put_checkpoints_aside(
    remote: RemoteRun, run: Path, listing: Mapping[str, RemoteFile], superseded: Superseded
) -> None:
    """Of the same step or epoch as one there, but with another content: they would be taken for the newer ones."""
    checkpointer = Checkpointer(run / CHECKPOINTS)
    for step in sorted(files_by_step(listing).keys() & set(checkpointer.steps())):
        path = checkpointer.path(step)
        try:
            differs = remote.manifest(step).sha256 != _sha256_of_manifest(path)
        except DamagedCheckpoint:
            continue
        if differs:
            superseded.take(path)
    sent = SentFiles(run, url=remote.store.url)
    for key in filter(EPOCH_KEY.fullmatch, listing):
        if (run / key).is_file() and not sent.is_last(key, listing):
            superseded.take(run / key)


def _sha256_of_manifest(path: Path) -> str | None:
    try:
        return read_manifest(path).sha256
    except DamagedCheckpoint:
        return None


def _merge_tags(remote: RemoteRun, run: Path, listing: Mapping[str, RemoteFile]) -> None:
    """Suspect is what either side suspects; otherwise those there count, and ours of the checkpoints that stayed."""
    checkpointer = Checkpointer(run / CHECKPOINTS)
    if _TAGS_KEY not in listing or not (run / _TAGS_KEY).exists():
        return
    merged = merge_tags(there=remote.tags(), here=checkpointer.tags(), steps=checkpointer.steps())
    if merged != checkpointer.tags():
        checkpointer.change_tags(lambda _: merged)


def merge_tags(*, there: Tags, here: Tags, steps: Collection[int]) -> Tags:
    """The tags of a run that was continued elsewhere.

    Args:
        steps: of the local checkpoints that count.
    """
    ours = here.without(here.good.union(here.suspect).difference(steps))
    best = there.best or (here.best if here.best is not None and here.best.step in steps else None)
    return Tags(there.good | ours.good, best=best).with_suspect(there.suspect | ours.suspect)


def _fetch(remote: RemoteRun, key: str, target: Path, superseded: Superseded) -> bool:
    """Makes a file what it is there, unless it begins with that already; returns whether it has changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".tmp-{new_token()}")
    try:
        with staging.open("xb") as file:
            for block in remote.stream(key):
                file.write(block)
        if target.exists():
            if _is_beginning(staging, of=target):
                return False
            if key in LEDGERS:
                staging.write_bytes(_with_lines_of(target.read_bytes(), after=staging.read_bytes()))
            superseded.take(target)
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)
    return True


def _with_lines_of(ours: bytes, *, after: bytes) -> bytes:
    """What is there, and then our lines that it lacks; a last line without its end is none."""
    known = set(after.splitlines())
    return after + b"".join(line for line in ours.splitlines(True) if line.endswith(b"\n") and line[:-1] not in known)


def _is_beginning(path: Path, *, of: Path) -> bool:
    with path.open("rb") as there, of.open("rb") as here:
        while block := there.read(_BLOCK_BYTES):
            if here.read(len(block)) != block:
                return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _is_private(key: str) -> bool:
    """Of no use to a run: who mirrors there, and hidden files."""
    return key == MARK_NAME or any(part.startswith(".") for part in key.split("/"))
