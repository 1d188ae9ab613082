"""Mirrors a run directory to a URL while the run goes on: ``--remote-sync``.

    logs, metrics, events, starts                          first: the history reaches as far as any checkpoint there
    checkpoints, newest first: files -> MANIFEST.json      the manifest is the commit: without it there is no checkpoint
    TAGS.json, LATEST, epoch_N.pt, ...                     each as a whole
    what retention has given up                            MANIFEST.json first, and only when a newer one is complete

A thread of rank 0 does this every ``--remote-sync-frequency`` seconds and once more at the end. It waits for the
network outside of Python's lock, and nothing of the run waits for it. Killed at any moment, it leaves every remote
checkpoint whole or absent, and goes on with the next file when the run starts again.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from training.checkpoint.checkpointer import Checkpointer
from training.checkpoint.manifest import MANIFEST_NAME, DamagedCheckpoint, Manifest, read_manifest, verify
from training.checkpoint.mirror_fetch import CHECKPOINTS, MARK_NAME, RemoteRun, files_by_step, step_prefix
from training.checkpoint.mirror_history import LEDGERS, knows_starts
from training.checkpoint.mirror_plan import (
    SentFiles,
    epoch_files_to_delete,
    is_due,
    is_history,
    keys_to_delete,
    plain_files,
    signature,
    whole_lines,
)
from training.checkpoint.mirror_store import (
    DEFAULT_OPTIONS,
    RemoteFile,
    RemoteMissing,
    RemoteOptions,
    RemoteRefused,
    RemoteStore,
    patiently,
)
from training.checkpoint.retention import steps_to_delete
from training.data.storage_errors import StorageCounters, StorageError
from training.naming import STARTS_FILE

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FINISH_TIMEOUT_S = 600.0
"""For what is left to upload when a run is done."""
SIGNAL_TIMEOUT_S = 20.0
"""For the same when a signal has ended the run: the job is killed soon, and its next start uploads the rest."""
_FINAL_PAUSE_S = 2.0


@dataclass(frozen=True)
class MirrorStatus:
    """How the mirror stands."""

    files: int = 0
    """Uploaded by this process."""
    bytes: int = 0
    retries: int = 0
    rounds: int = 0
    failures: int = 0
    """Rounds that did not come to their end."""
    refused: int = 0
    """Those of them for which no permission, credentials or bucket was there."""
    newest_step: int | None = None
    """The newest checkpoint known to be whole at the other side."""
    complete: bool = False
    """Whether the last round left nothing out."""
    last_error: str | None = None


@contextmanager
def start_errors(flag: str) -> Iterator[None]:
    """While a run starts: ValueError for what its user can mend, RuntimeError for what may pass."""
    try:
        yield
    except RemoteRefused as error:
        raise ValueError(f"{flag}: {error}") from error
    except StorageError as error:
        raise RuntimeError(f"{flag}: {error}") from error


class _Abandoned(Exception):
    """The time to finish is over."""


class Mirror:
    """Uploads one run. On rank 0, which owns the directory."""

    def __init__(
        self,
        run: Path,
        store: RemoteStore,
        *,
        every_s: float = 300.0,
        keep: int = 2,
        keep_every: int = 0,
        deletes: bool = True,
        fence: Callable[[], None] | None = None,
        options: RemoteOptions = DEFAULT_OPTIONS,
    ) -> None:
        """
        Args:
            run: the run's directory.
            store: URL/NAME.
            keep, keep_every: as of the run's ``Checkpointer``.
            deletes: whether what the run has given up goes there as well.
            fence: raises if another start owns the run by now; asked before every change that a reader could see.
        """
        self._run = run
        self._store = store
        self._every_s = every_s
        self._keep = keep
        self._keep_every = keep_every
        self._deletes = deletes
        self._continues = True
        """What is there belongs to this run, so that no line of its history may be lost."""
        self._fence = fence
        self._mark: bytes | None = None
        """What this start has written there; whoever mirrors later writes another."""
        self._options = options
        self._checkpointer = Checkpointer(run / CHECKPOINTS)
        self._sent = SentFiles(run, url=store.url)
        self._counters = StorageCounters()
        self._confirmed: set[int] = set()
        """Steps that this process has uploaded, or compared, as a whole."""
        self._skipped = False
        self._listing: dict[str, RemoteFile] = {}
        self._status = MirrorStatus()
        self._stopping = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)

    @property
    def status(self) -> MirrorStatus:
        """How it stands now; from any thread."""
        return replace(self._status, retries=self._counters["retries"])

    def check(self, *, continues: bool) -> None:
        """Returns if the run can be mirrored: lists, writes, reads and removes what killed uploads have left.

        Args:
            continues: the run resumes from its own checkpoints, so that those at the other side are its own.

        Raises:
            ValueError: the URL, the credentials or the permissions do not allow it, or another run is there, or what
                another directory has made of this one.
            RuntimeError: the storage does not work.
        """
        with start_errors("--remote-sync"):
            steps = RemoteRun(self._store, options=self._options).steps()
            if steps and not continues:
                raise ValueError(
                    f"{self._store.url} holds checkpoints of another run of this name, up to step {steps[-1]}: pass "
                    "--resume latest to go on from there, or another --name or --remote-sync."
                )
            self._continues = continues
            self._check_history()
            facts = {"host": socket.gethostname(), "directory": str(self._run.resolve()), "time": time.time()}
            mark = json.dumps(facts | {"start": uuid.uuid4().hex}).encode() + b"\n"
            self._patiently("Writing", lambda: self._store.write(MARK_NAME, mark))
            self._mark = self._patiently("Reading", lambda: self._store.read(MARK_NAME))
            if self._mark != mark:
                raise RuntimeError(f"{self._store.url}/{MARK_NAME} reads otherwise than it was written.")
        try:
            aborted = self._store.abort_unfinished() if self._deletes else 0
        except Exception as error:  # a courtesy: costs storage, not correctness
            logger.info("Unfinished uploads at %s could not be removed: %s.", self._store.url, error)
        else:
            if aborted:
                logger.info("Removed %d unfinished uploads at %s.", aborted, self._store.url)

    def start(self) -> None:
        """Begins to upload: at once, then every ``every_s`` seconds."""
        self._thread.start()

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S) -> MirrorStatus:
        """Uploads what is left, for ``timeout_s`` at most, and ends the thread. Never raises: the run itself is whole.

        What could not be uploaded is an error in the log with the command that uploads it, and ``complete`` is False.
        In a ``finally`` it hides no exception that is on its way.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        status = self.status
        if self._thread.is_alive() or self._thread.ident is None:
            self._abandoned.set()
            error = "never begun" if self._thread.ident is None else f"not finished after {timeout_s:.0f} s"
            # Not in self._status, which the thread may still replace.
            status = replace(status, complete=False, last_error=error)
        if not status.complete:
            logger.error(
                "%s is not a complete mirror of %s (%s). Nothing is lost here; to upload the rest: clipyard "
                "checkpoints mirror %s %s",
                *(self._store.url, self._run, status.last_error, self._run, self._store.url),
            )
        return status

    def upload_once(self, *, final: bool = False) -> bool:
        """One round; returns whether everything is there now. Failures are logged and counted, not raised."""
        complete, refused, error = False, False, None
        try:
            self._round(final=final)
            complete = not self._skipped
            error = None if complete else "files that could not be read here were left out"
        except _Abandoned:
            error = "there was no time left"
        except RemoteRefused as refusal:
            refused, error = True, str(refusal)
            logger.error("Mirroring is refused: %s The run goes on; next attempt in %.0f s.", error, self._every_s)
        except Exception as failure:
            # Whatever it is, it must not end the run; it is counted, logged, and tried again.
            error = str(failure) or type(failure).__name__
            logger.warning("Mirroring to %s failed: %s", self._store.url, error)
        self._status = replace(
            self._status,
            rounds=self._status.rounds + 1,
            failures=self._status.failures + (error is not None),
            refused=self._status.refused + refused,
            newest_step=max(self._confirmed, default=None),
            complete=complete,
            last_error=error,
        )
        return complete

    def _work(self) -> None:
        pause_s = 0.0
        while True:
            final = self._stopping.wait(pause_s)
            refused_before = self._status.refused
            try:
                complete = self.upload_once(final=final)
            except BaseException as panic:  # a client in another language has no Exception for its own mistakes
                complete = False
                self._count_failure(f"{type(panic).__name__}: {panic}")
            if final and (complete or self._abandoned.is_set() or self._status.refused > refused_before):
                return
            pause_s = self._every_s
            if final:
                self._abandoned.wait(_FINAL_PAUSE_S)

    def _count_failure(self, error: str) -> None:
        logger.warning("Mirroring to %s failed: %s", self._store.url, error)
        self._status = replace(
            self._status,
            rounds=self._status.rounds + 1,
            failures=self._status.failures + 1,
            complete=False,
            last_error=error,
        )

    def _round(self, *, final: bool) -> None:
        self._check_owner()
        self._skipped = False
        self._listing = self._patiently("Listing", self._store.list)
        if not self._sent.is_last(STARTS_FILE, self._listing):
            self._check_history()
        self._confirmed &= set(files_by_step(self._listing))
        steps = self._checkpointer.steps()  # before the logs are read: those reach as far as these
        files = plain_files(self._run)
        for path in files:
            if is_history(path):
                self._upload_file(path, final=final)
        for step in reversed(steps):  # the newest is worth most
            with self._checkpointer.hold(step):
                self._upload_step(step)
        for path in files:
            if not is_history(path):
                self._upload_file(path, final=final)
        self._delete_old(self._checkpointer.steps(), [path.relative_to(self._run).as_posix() for path in files])

    def _check_history(self) -> None:
        """Raises RemoteRefused if another directory has gone on with the run: nothing of what it did is overwritten."""
        if self._continues and not knows_starts(self._run, self._read_or_nothing(STARTS_FILE)):
            raise RemoteRefused(
                f"{self._store.url}/{STARTS_FILE} has starts that {self._run} does not know: another directory "
                "has gone on with this run. Start it with --resume latest and --remote-sync, which fetches that."
            )

    def _read_or_nothing(self, key: str) -> bytes:
        def read() -> bytes:
            try:
                return self._store.read(key)
            except RemoteMissing:
                return b""

        return self._patiently("Reading", read)

    def _upload_step(self, step: int) -> None:
        """Uploads a checkpoint unless it is there already; one that is damaged, or gone by now, is left out."""
        directory = self._checkpointer.path(step)
        manifest = None
        try:
            manifest, data = read_manifest(directory), (directory / MANIFEST_NAME).read_bytes()
            if sha256(data).hexdigest() != manifest.sha256 or self._is_whole(step, manifest, data):
                return  # replaced just now: the next round sees one or the other
            verify(directory)
            self._retract(step, manifest)
            for name, facts in manifest.files.items():
                key = step_prefix(step) + name
                self._upload(key, directory / name, local=f"sha256:{facts.sha256}", size=facts.size)
            if read_manifest(directory) != manifest:
                return
        except (DamagedCheckpoint, FileNotFoundError) as damage:
            self._left_out(directory, manifest, damage)
            return
        self._check_owner()
        self._write(step_prefix(step) + MANIFEST_NAME, data, local=f"sha256:{manifest.sha256}")
        self._confirmed.add(step)
        logger.info("Mirrored %s to %s.", directory.name, self._store.url)

    def _left_out(self, directory: Path, manifest: Manifest | None, damage: Exception) -> None:
        """Retention may delete a checkpoint while it is uploaded, and a later save may replace it: no damage at all."""
        if not directory.is_dir():
            return
        self._skipped = True
        if manifest is None or _manifest_of(directory) == manifest:
            logger.warning("Not mirrored, since it is damaged here: %s.", damage)

    def _is_whole(self, step: int, manifest: Manifest, data: bytes) -> bool:
        """Whether this checkpoint, and no other of the same step, is complete at the other side."""
        prefix = step_prefix(step)
        if step not in self._confirmed:
            sizes = {name: file.size for name, file in files_by_step(self._listing).get(step, {}).items()}
            expected = {name: facts.size for name, facts in manifest.files.items()} | {MANIFEST_NAME: len(data)}
            if sizes != expected:
                return False
            if self._patiently("Reading", lambda: self._store.read(prefix + MANIFEST_NAME)) != data:
                return False
            self._sent.add(prefix + MANIFEST_NAME, f"sha256:{manifest.sha256}", self._listing[prefix + MANIFEST_NAME])
            self._confirmed.add(step)
        return self._sent.is_there(prefix + MANIFEST_NAME, f"sha256:{manifest.sha256}", self._listing)

    def _retract(self, step: int, manifest: Manifest) -> None:
        """Before files of a checkpoint are replaced, it ends to be one. Files of another shape of it go as well."""
        present = files_by_step(self._listing).get(step, {})
        self._confirmed.discard(step)
        for stale in (present.keys() & {MANIFEST_NAME}, present.keys() - {*manifest.files, MANIFEST_NAME}):
            self._delete([step_prefix(step) + name for name in sorted(stale)])

    def _upload_file(self, path: Path, *, final: bool) -> None:
        key = path.relative_to(self._run).as_posix()
        try:
            before = signature(path)
            size = path.stat().st_size
            if self._sent.is_there(key, before, self._listing) or not is_due(size, self._sent.get(key), final=final):
                return
            if path.suffix == ".pt":  # replaced as a whole, never written to
                self._upload(key, path, local=before, size=size)
                return
            data = whole_lines(path, path.read_bytes())
            if self._would_lose_lines(key, data):
                self._skipped = True
                logger.error("%s/%s has lines that %s lacks: it is not overwritten.", self._store.url, key, path)
                return
        except FileNotFoundError:
            return
        except OSError as error:
            self._skipped = True
            logger.warning("Not mirrored, since it cannot be read: %s (%s).", path, error.strerror)
            return
        self._write(key, data, local=before)

    def _would_lose_lines(self, key: str, data: bytes) -> bool:
        """Of files that only grow; metrics may shrink, when a run goes on from an earlier step."""
        checked = key in LEDGERS and self._continues and not self._sent.is_last(key, self._listing)
        return checked and not data.startswith(self._read_or_nothing(key))

    def _upload(self, key: str, path: Path, *, local: str, size: int) -> None:
        """One file, unless it is there. Raises FileNotFoundError if it is not here."""
        if self._sent.is_there(key, local, self._listing):
            return
        self._forget([key])
        try:
            self._patiently(f"Uploading {path.name}", lambda: self._store.upload(key, path))
        except StorageError:
            path.stat()  # if that is what is missing, it is not the storage's fault
            raise
        self._uploaded(key, local, size)

    def _write(self, key: str, data: bytes, *, local: str) -> None:
        self._forget([key])
        self._patiently(f"Writing {key}", lambda: self._store.write(key, data))
        self._uploaded(key, local, len(data))

    def _uploaded(self, key: str, local: str, size: int) -> None:
        found = self._patiently("Looking", lambda: self._store.head(key))
        if found.size != size:
            raise StorageError(f"{self._store.url}/{key} has {found.size} bytes, not {size}: it is sent again.")
        self._listing[key] = found
        self._sent.add(key, local, found)
        self._sent.write()
        self._status = replace(self._status, files=self._status.files + 1, bytes=self._status.bytes + size)

    def _delete_old(self, local_steps: Collection[int], local_keys: Collection[str]) -> None:
        if not self._deletes:
            return
        whole = [step for step, files in files_by_step(self._listing).items() if MANIFEST_NAME in files]
        doomed = steps_to_delete(
            whole, keep=self._keep, every=self._keep_every, tags=self._checkpointer.tags(), verified=self._confirmed
        )
        for keys in keys_to_delete(self._listing, local_steps=local_steps, confirmed=self._confirmed, doomed=doomed):
            self._delete(keys[:1])  # from here on it is no checkpoint
            self._delete(keys[1:])
        ours = [key for key in self._sent if self._sent.is_last(key, self._listing)]
        self._delete(epoch_files_to_delete(self._listing, local=local_keys, sent=ours))

    def _delete(self, keys: list[str]) -> None:
        if not keys:
            return
        self._check_owner()
        self._forget(keys)
        self._patiently("Deleting", lambda: self._store.delete(keys))
        for key in keys:
            self._listing.pop(key, None)

    def _check_owner(self) -> None:
        """Before changes that readers see. Raises what the fence raises, or RemoteRefused."""
        if self._fence is not None:
            self._fence()
        if self._mark is None:
            return
        found = self._patiently("Reading", lambda: self._store.read(MARK_NAME))
        if found != self._mark:
            raise RemoteRefused(
                f"another start of this run mirrors to {self._store.url} by now "
                f"({found.decode(errors='replace').strip()})."
            )

    def _forget(self, keys: list[str]) -> None:
        """Before something changes there: killed in between, we send it again."""
        known = [key for key in keys if self._sent.get(key) is not None]
        if known:
            self._sent.forget(known)
            self._sent.write()

    def _patiently(self, what: str, call: Callable[[], Result]) -> Result:
        if self._abandoned.is_set():
            raise _Abandoned
        try:
            return patiently(
                f"{what} at {self._store.url}", call, options=self._options, counters=self._counters, wait=self._wait
            )
        except RemoteMissing as error:
            raise StorageError(str(error)) from error

    def _wait(self, seconds: float) -> None:
        if self._abandoned.wait(seconds):
            raise _Abandoned


def _manifest_of(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory)
    except DamagedCheckpoint:
        return None
