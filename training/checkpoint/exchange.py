"""Swaps two directories in one step, so that at no moment one of the names is without a directory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(first: Path, second: Path) -> None:
    """Each gets the other's name. Without the system call for it (not Linux, some network disks) three renames do."""
    if not _exchange_at_once(first, second):
        aside = first.with_name(f"{first.name}-aside")
        second.rename(aside)
        first.rename(second)
        aside.rename(first)


def _exchange_at_once(first: Path, second: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)
