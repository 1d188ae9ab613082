"""Which process of this node listens on a port: for the message when somebody else has it. Linux; read from /proc."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_LISTENING = "0A"
_SHOWN = 120
"""Characters of a command line."""


def who_listens(port: int) -> str:
    """The process, as a user names it; other users' processes cannot be seen."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        if sockets & set(_open_sockets(process)):
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name} of this node: {command[:_SHOWN]}"
    return "another user's process on this node" if sockets else "a process that has ended meanwhile"


def _inodes(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                # sl local_address remote_address state queues timers retransmits uid timeout inode
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]


def _open_sockets(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(descriptor.readlink())
