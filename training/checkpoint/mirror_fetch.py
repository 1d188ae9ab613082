"""Brings the checkpoints of a run back from where they were mirrored.

    URL/NAME/checkpoints/step_00000120/MANIFEST.json   readable: the checkpoint exists; not there: it does not
    URL/NAME/checkpoints/step_00000120/*               sizes and sha256 as the manifest says
    -> RUN/checkpoints/.tmp-00000120-...               downloaded, hashed on the way, flushed
    -> RUN/checkpoints/step_00000120                   renamed

Nothing that does not verify ever gets the name of a checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from training.checkpoint.checkpointer import Checkpointer, check_usable, new_token, temporary_name
from training.checkpoint.manifest import (
    MANIFEST_NAME,
    DamagedCheckpoint,
    FileFacts,
    Manifest,
    fsync,
    read_manifest,
)
from training.checkpoint.mirror_store import (
    DEFAULT_OPTIONS,
    RemoteFile,
    RemoteMissing,
    RemoteOptions,
    RemoteStore,
    open_store,
    patiently,
)
from training.checkpoint.tags import TAGS_NAME, Tags, parse_tags, resume_order
from training.data.storage_errors import Patience, StorageCounters, Transient

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MARK_NAME = "MIRROR.json"
"""Who mirrors here; of no use to a run."""
_STEP_KEY = re.compile(rf"{CHECKPOINTS}/step_(\d{{8,}})/(.+)")
EPOCH_KEY = re.compile(rf"{CHECKPOINTS}/[^/]*\.pt")
_STEP_END = re.compile(r"/step_(\d{8,})/?$")
_FILES_AT_ONCE = 4


class RemotePlace(NamedTuple):
    """A URL that names a run, and perhaps one of its checkpoints."""

    run: str
    step: int | None


def parse_place(url: str) -> RemotePlace:
    """``URL/NAME``, ``URL/NAME/checkpoints`` or ``URL/NAME/checkpoints/step_00000120``."""
    match = _STEP_END.search(url)
    run = url[: match.start()] if match else url.rstrip("/")
    return RemotePlace(run.removesuffix(f"/{CHECKPOINTS}"), int(match[1]) if match else None)


def step_prefix(step: int) -> str:
    """Of the keys of a checkpoint."""
    return f"{CHECKPOINTS}/step_{step:08d}/"


def is_step_key(key: str) -> bool:
    """Whether an object is a file of a checkpoint."""
    return _STEP_KEY.fullmatch(key) is not None


def files_by_step(listing: Mapping[str, RemoteFile]) -> dict[int, dict[str, RemoteFile]]:
    """The files of each step, whole or not, by their name beside the manifest."""
    steps: dict[int, dict[str, RemoteFile]] = {}
    for key, file in listing.items():
        match = _STEP_KEY.fullmatch(key)
        if match:
            steps.setdefault(int(match[1]), {})[match[2]] = file
    return steps


class RemoteRun:
    """A mirrored run, read only."""

    def __init__(self, store: RemoteStore, *, options: RemoteOptions = DEFAULT_OPTIONS) -> None:
        self.store = store
        self._options = options

    def listing(self, prefix: str = "") -> dict[str, RemoteFile]:
        """All its objects, or those of one folder."""
        return patiently(f"Listing {self.store.url}", lambda: self.store.list(prefix), options=self._options)

    def read(self, key: str) -> bytes:
        """A small object. Raises RemoteMissing."""
        return patiently(f"Reading {self.store.url}/{key}", lambda: self.store.read(key), options=self._options)

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending: the checkpoints that were uploaded to the end."""
        found = files_by_step(self.listing(f"{CHECKPOINTS}/"))
        return sorted(step for step, files in found.items() if MANIFEST_NAME in files)

    def tags(self) -> Tags:
        """What the run knew about its checkpoints; nothing if that cannot be read."""
        try:
            return parse_tags(self.read(f"{CHECKPOINTS}/{TAGS_NAME}").decode())
        except RemoteMissing:
            return Tags()
        except ValueError as error:
            logger.warning("%s/%s/%s cannot be read (%s).", self.store.url, CHECKPOINTS, TAGS_NAME, error)
            return Tags()

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            DamagedCheckpoint: it is not there, not one, or a file beside it is missing or has another size.
        """
        with tempfile.TemporaryDirectory() as scratch:
            try:
                (Path(scratch) / MANIFEST_NAME).write_bytes(self.read(step_prefix(step) + MANIFEST_NAME))
                manifest = read_manifest(Path(scratch))
            except (RemoteMissing, DamagedCheckpoint):
                raise DamagedCheckpoint(f"{self._name(step)} has no readable {MANIFEST_NAME}") from None
        files = files_by_step(self.listing(step_prefix(step))).get(step, {})
        for name, expected in manifest.files.items():
            size = files[name].size if name in files else None
            if size != expected.size:
                raise DamagedCheckpoint(
                    f"{self._name(step)}/{name} was written with {expected.size} bytes and "
                    f"{'is missing' if size is None else f'has {size}'}"
                )
        return manifest

    def stream(self, key: str) -> Iterator[bytes]:
        """An object from its beginning to its end; a broken connection goes on at the byte reached."""
        patience = Patience(self._options, counters=StorageCounters())
        at = 0
        while True:
            try:
                for block in self.store.stream(key, at):
                    at += len(block)
                    patience.progress(len(block))
                    yield block
                return
            except Transient as error:
                time.sleep(patience.failed(f"Reading {self.store.url}/{key} at byte {at}", error))

    def describe(self, step: int, name: str) -> FileFacts:
        """Size and sha256 of a file, read to its end."""
        digest, size = hashlib.sha256(), 0
        for block in self.stream(step_prefix(step) + name):
            digest.update(block)
            size += len(block)
        return FileFacts(size, digest.hexdigest())

    def download(self, step: int, checkpoints: Path, *, generation: int = 0) -> Path:
        """Makes a checkpoint of the run a local one; returns its directory.

        Raises:
            DamagedCheckpoint: what is there is not what was written. StorageError: it cannot be read. OSError.
        """
        manifest = self.manifest(step)
        final = checkpoints / f"step_{step:08d}"
        token = new_token()
        staging = checkpoints / temporary_name(f"{step:08d}", generation=generation, token=token)
        staging.mkdir(parents=True)
        try:
            self.fetch_files(step, manifest, list(manifest.files), staging)
            fsync(staging)
            check_usable(staging)
            if final.exists():  # damaged, or it would not be fetched
                final.rename(checkpoints / temporary_name(f"trash-{step:08d}", generation=generation, token=token))
            staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        fsync(checkpoints)
        return final

    def fetch_files(self, step: int, manifest: Manifest, names: Sequence[str], directory: Path) -> None:
        """Downloads some files of a checkpoint, several at once, and its manifest.

        Raises:
            DamagedCheckpoint: one is not what was written.
        """
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(lambda name: self._download(step, name, manifest.files[name], directory), names))
        (directory / MANIFEST_NAME).write_bytes(self.read(step_prefix(step) + MANIFEST_NAME))
        fsync(directory / MANIFEST_NAME)
        if read_manifest(directory) != manifest:
            raise DamagedCheckpoint(f"{self._name(step)} was replaced while it was read")

    def _download(self, step: int, name: str, expected: FileFacts, directory: Path) -> None:
        digest, size = hashlib.sha256(), 0
        key = step_prefix(step) + name
        try:
            with (directory / name).open("xb") as file:
                for block in self.stream(key):
                    digest.update(block)
                    size += len(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except RemoteMissing:
            raise DamagedCheckpoint(f"{self.store.url}/{key} is missing") from None
        if FileFacts(size, digest.hexdigest()) != expected:
            raise DamagedCheckpoint(f"{self.store.url}/{key} has {size} bytes that are not those that were written")

    def _name(self, step: int) -> str:
        return f"{self.store.url}/{step_prefix(step)}".rstrip("/")


def fetch_newest(remote: RemoteRun, checkpoints: Path, *, generation: int = 0) -> Path | None:
    """The newest whole checkpoint, here or there, as a local directory; None if there is none at either place.

    The order is that of a start without a mirror: newest first, suspect ones last. On rank 0, before other ranks look.

    Raises:
        DamagedCheckpoint: there are checkpoints, and none is whole. StorageError: the remote cannot be read.
    """
    checkpointer = Checkpointer(checkpoints)
    local, away = set(checkpointer.steps()), set(remote.steps())
    tags = remote.tags()
    if (checkpoints / TAGS_NAME).is_file():  # it knows nothing of what was only there
        tags = checkpointer.tags().with_suspect(tags.suspect - local)
    damages: list[str] = []
    for step in resume_order(sorted(local | away), tags):
        try:
            if step in local and _is_usable(checkpointer.path(step), damages):
                return checkpointer.path(step)
            if step in away:
                return remote.download(step, checkpoints, generation=generation)
        except DamagedCheckpoint as damage:
            logger.warning("Skipping a damaged checkpoint: %s.", damage)
            damages.append(str(damage))
    if damages:
        raise DamagedCheckpoint(
            f"None of the {len(damages)} step checkpoints in {checkpoints} and {remote.store.url} is whole "
            f"({damages[0]}): restore one, or pass --resume PATH, or --allow-restart-from-zero."
        )
    return None


def fetch_url(url: str, checkpoints: Path, *, protocol: str | None = None, generation: int = 0) -> Path:
    """The checkpoint that ``--resume URL`` names, as a local directory: of a run its newest whole one.

    Raises:
        ValueError: there is none. DamagedCheckpoint: there is, and it is not whole.
    """
    place = parse_place(url)
    remote = RemoteRun(open_store(place.run, protocol=protocol))
    steps = remote.steps()
    if not steps or (place.step is not None and place.step not in steps):
        raise ValueError(
            f"{url!r} is no checkpoint (URL/RUN or URL/RUN/checkpoints/step_N; the steps there: {steps}): correct "
            "--resume."
        )
    damages: list[str] = []
    for step in resume_order(steps, remote.tags()) if place.step is None else [place.step]:
        try:
            local = checkpoints / f"step_{step:08d}"
            if local.is_dir() and _is_usable(local, damages) and read_manifest(local) == remote.manifest(step):
                return local
            return remote.download(step, checkpoints, generation=generation)
        except DamagedCheckpoint as damage:
            logger.warning("Skipping a damaged checkpoint: %s.", damage)
            damages.append(str(damage))
    raise DamagedCheckpoint(f"No checkpoint at {url} is whole ({damages[0]}): correct --resume.")


def _is_usable(path: Path, damages: list[str]) -> bool:
    try:
        check_usable(path)
    except DamagedCheckpoint as damage:
        logger.warning("Skipping a damaged checkpoint: %s.", damage)
        damages.append(str(damage))
        return False
    return True
