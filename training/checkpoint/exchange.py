"""Puts a directory in the place of another, so that a crash at any moment leaves the one or the other to be found."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def put_in_place(new: Path, old: Path, *, aside: Path) -> Path:
    """Gives ``new`` the name of ``old``; returns where the old one is now.

    At no moment the name is without a directory. Where the system has no call for that (not Linux, NFS and other
    network disks), the old one is renamed to ``aside`` first: after a crash just then it has to be brought back.

    Raises:
        OSError: the new one cannot be renamed; the old one has its name again.
    """
    if _exchange_at_once(new, old):
        return new
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    return aside


def _exchange_at_once(first: Path, second: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
