"""What a node says that does not reach rank 0: the run directory is then the only thing that both of them see.

RUN/.doctor-unreached/NODE     holds the identity of the start that it is about
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

_DIRECTORY = ".doctor-unreached"


@contextlib.contextmanager
def complaining_after(seconds: float, run: Path, *, node: str, identity: str) -> Iterator[None]:
    """Complains if what is inside has not succeeded by then; takes it back if it succeeds after all."""
    timer = Timer(seconds, complain, (run, node, identity))
    timer.daemon = True  # a file system that hangs must not keep the process
    timer.start()
    try:
        yield
    finally:
        complained = not timer.is_alive()
        timer.cancel()
    if complained:
        with contextlib.suppress(OSError):
            (run / _DIRECTORY / node).unlink(missing_ok=True)
            (run / _DIRECTORY).rmdir()


def complain(run: Path, node: str, identity: str) -> None:
    """From this node rank 0 cannot be reached."""
    with contextlib.suppress(OSError):  # whoever has no run directory either is only missing
        (run / _DIRECTORY).mkdir(parents=True, exist_ok=True)
        (run / _DIRECTORY / node).write_text(identity)


def read_complaints(run: Path, identity: str) -> set[str]:
    """The nodes that say it of this start."""
    found = set()
    with contextlib.suppress(OSError):
        for path in (run / _DIRECTORY).iterdir():
            with contextlib.suppress(OSError):  # it is taken back just now
                if path.read_text(errors="replace") == identity:
                    found.add(path.name)
    return found


def clear_complaints(run: Path) -> None:
    """They have been heard."""
    shutil.rmtree(run / _DIRECTORY, ignore_errors=True)
