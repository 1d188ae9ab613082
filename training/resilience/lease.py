"""Which start of a run owns its directory: one job at a time, and a fence against those that came before.

    RUN/leases/00000007.json       made by the seventh start, complete and only once; the highest number owns the run
    RUN/leases/00000007.released   it has ended and will write nothing any more

A start takes over what was released and what can be seen to have ended: the process is gone, its machine was booted
again, or the scheduler says so. Clocks and modification times decide nothing: they lie across machines. Locks of the
file system do not count either: on Lustre and NFS they may be switched off.

A job that was thought dead may wake up. It asks ``check`` before it commits anything, and finds the newer number.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from training.resilience.owner import Owner, this_process, why_ended

logger = logging.getLogger(__name__)

_LEASE = re.compile(r"(\d{8})\.json")


class LeaseLost(RuntimeError):
    """Another start owns the run directory now; this one must write nothing there any more."""


class Lease:
    """The claim of one start of a run on its directory."""

    def __init__(self, directory: Path, generation: int) -> None:
        """For a rank that was told the generation; ``claim_lease`` is what makes one."""
        self.generation = generation
        self._directory = directory
        self._released = False

    def check(self) -> None:
        """The fence: call it last before anything becomes visible in the run directory. From any thread.

        Raises:
            LeaseLost: a newer start owns the directory, or this one has given it back.
        """
        if self._released:
            raise LeaseLost(f"generation {self.generation} of {self._directory.parent} was released already")
        # A listing, not a look for the next number: NFS remembers for a while that a file was not there.
        newest = max(_generations(self._directory), default=0)
        if newest > self.generation:
            raise LeaseLost(
                f"{self._directory.parent} belongs to generation {newest} now, this process is generation "
                f"{self.generation}: it was taken for dead, and ends without writing anything there"
            )
        if newest < self.generation:
            raise LeaseLost(
                f"{_path(self._directory, self.generation)} is gone: somebody has removed or replaced the run "
                "directory, so this process writes nothing there"
            )

    def release(self) -> None:
        """Lets the next start begin without proof that this one has ended. Nothing may be written afterwards."""
        if not self._released:
            self._released = True
            # Where it fails, the next start has to see for itself that this process has ended.
            with contextlib.suppress(OSError):
                _path(self._directory, self.generation).with_suffix(".released").touch()


def claim_lease(directory: Path, *, take_over: bool, environment: Mapping[str, str] = os.environ) -> Lease:
    """Makes this start the owner of the run. On one rank, before it reads or writes anything else there.

    Raises:
        ValueError: another job owns the run, or nothing can be written there.
    """
    me = this_process(environment)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            generation = max(_generations(directory), default=0)
            if generation:
                _check_ended(directory, generation, me=me, take_over=take_over)
            if _create(_path(directory, generation + 1), me):
                _remove_partial(directory)
                return Lease(directory, generation + 1)
            # Another start was faster; it owns the run now, and lives.
            take_over = False
    except OSError as error:
        raise ValueError(
            f"the run directory {directory.parent} cannot be written ({error.strerror}): "
            "pass --logs DIR with a directory that can, or --logs none."
        ) from error


def find_owner(directory: Path, *, environment: Mapping[str, str] = os.environ) -> str | None:
    """Who may be writing to the run now, in words; None if nobody is. Only looks.

    Raises:
        OSError: the leases cannot be read.
    """
    try:
        generation = max(_generations(directory), default=0)
    except FileNotFoundError:
        return None
    path = _path(directory, generation)
    if not generation or path.with_suffix(".released").exists():
        return None
    reason, who = _what_became_of_owner(path, me=this_process(environment))
    return who if reason is None else None


def _what_became_of_owner(path: Path, *, me: Owner) -> tuple[str | None, str]:
    """How it is known that the owner has ended, None if it is not, and who it is."""
    owner = _read(path)
    if owner is None:
        return None, f"somebody whose lease {path} cannot be read"
    return why_ended(owner, me=me), owner.describe()


def _check_ended(directory: Path, generation: int, *, me: Owner, take_over: bool) -> None:
    path = _path(directory, generation)
    if path.with_suffix(".released").exists():
        return
    reason, who = _what_became_of_owner(path, me=me)
    if reason is not None:
        logger.info("The run was left by %s (%s): going on as generation %d.", who, reason, generation + 1)
    elif take_over:
        logger.warning("--take-over: the run is taken from %s.", who)
    else:
        raise ValueError(
            f"run {directory.parent.name} is in use by {who}: wait until it has ended, or end it. If it certainly has, "
            "and this machine cannot see that, pass --take-over; or choose another --name."
        )


def _read(path: Path) -> Owner | None:
    """None if the file does not hold what was written."""
    try:
        return Owner.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError):
        return None


def _create(path: Path, me: Owner) -> bool:
    """Makes a lease that is complete from the moment it can be seen; False if there is one of this generation."""
    record = me.to_json() | {
        "generation": int(path.stem),
        "user": _user(),
        # For people; nothing is decided by it.
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    partial = path.with_name(f".claim-{secrets.token_hex(8)}")
    try:
        _write(partial, record)
        try:
            os.link(partial, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            _write(path, record)  # a file system without hard links: exclusive all the same
    except (FileExistsError, FileNotFoundError):  # another start has made it, and perhaps tidied up already
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _write(path: Path, record: Mapping[str, object]) -> None:
    with path.open("x") as file:
        file.write(json.dumps(record, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _remove_partial(directory: Path) -> None:
    """What starts that were killed half way have left, or others that come too late are about to notice."""
    for path in directory.glob(".claim-*"):
        path.unlink(missing_ok=True)


def _generations(directory: Path) -> list[int]:
    return [int(match[1]) for name in os.listdir(directory) if (match := _LEASE.fullmatch(name))]


def _path(directory: Path, generation: int) -> Path:
    return directory / f"{generation:08d}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return str(os.getuid())
