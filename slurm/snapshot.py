"""Copies the code that a job will run into its run directory: what is edited meanwhile does not reach a waiting job.

RUN/code/   training/ models/ slurm/ configs/, and SNAPSHOT.json: a digest of them, and the commit if there is one
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("training", "models", "slurm", "configs")
SNAPSHOT_NAME = "SNAPSHOT.json"
SOURCE = Path(__file__).resolve().parent.parent
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def code_digest(source: Path = SOURCE) -> str:
    """sha256 over names and contents of all files that a snapshot holds."""
    digest = hashlib.sha256()
    for path in _files(source):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def snapshot_digest(run: Path) -> str | None:
    """The digest of the code in a run directory; None if there is no whole snapshot."""
    try:
        content: dict[str, Any] = json.loads((run / "code" / SNAPSHOT_NAME).read_text())
        return str(content["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def take_snapshot(run: Path, *, source: Path = SOURCE) -> str:
    """Replaces RUN/code as a whole; returns the digest. Equal code is left as it is."""
    digest = code_digest(source)
    if snapshot_digest(run) == digest:
        return digest
    target, partial, old = run / "code", run / ".code.partial", run / ".code.old"
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(source / package, partial / package, ignore=_LEFT_OUT)
    record = {"digest": digest, "commit": _commit(source), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    (partial / SNAPSHOT_NAME).write_text(json.dumps(record, indent=1) + "\n")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return digest


def _files(source: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((source / package).rglob("*")):
            parts = path.relative_to(source).parts
            if (
                path.is_file()
                and path.suffix != ".pyc"
                and not any(part.startswith((".", "__pycache__")) for part in parts)
            ):
                yield path


def _commit(source: Path) -> str | None:
    """Of a checkout, with ``+`` where it has changes; None for an installed copy."""
    if not (source / ".git").exists():
        return None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit + ("+" if _git(source, "status", "--porcelain", "--", *PACKAGES) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(source: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()
