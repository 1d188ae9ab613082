"""The log on screen and in out.log; in a terminal also one progress line, redrawn in place."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from training.observability.metrics import format_duration

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d,%H:%M:%S"


class ProgressLine:
    """The last line of a terminal: step, rate, loss, time left. Silent where the output is not a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._enabled = stream.isatty()
        self._width = 0

    def show(self, *, step: int, total_steps: int, samples_per_second: float, loss: float, remaining_s: float) -> None:
        """Redraws the line."""
        if not self._enabled:
            return
        done = 30 * step // total_steps
        text = (
            f"[{'#' * done}{'.' * (30 - done)}] {step}/{total_steps} steps  {samples_per_second:,.0f} samples/s  "
            f"loss {loss:.3f}  ETA {format_duration(remaining_s)}"
        )
        self._stream.write(f"\r{text:<{self._width}}")
        self._stream.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Makes room for an ordinary line."""
        if self._width:
            self._stream.write(f"\r{' ' * self._width}\r")
            self._width = 0


class _ScreenHandler(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO, progress: ProgressLine) -> None:
        super().__init__(stream)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.clear()
        super().emit(record)


def set_up_logging(*, path: Path | None, debug: bool, rank: int, on_screen: bool) -> ProgressLine:
    """Logs to ``path`` (if any) and, on the main rank, to the screen; returns the progress line.

    Warnings of other ranks go to the screen too: what only rank 3 sees must not get lost.
    """
    progress = ProgressLine(sys.stderr)
    screen = _ScreenHandler(sys.stderr, progress)
    if not on_screen:
        screen.setLevel(logging.WARNING)
    prefix = "" if rank == 0 else f"rank {rank} | "
    handlers: list[logging.Handler] = [screen]
    if path is not None:
        handlers.append(logging.FileHandler(path))
    root = logging.getLogger()
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"{prefix}{_FORMAT}", _DATE_FORMAT))
        root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("PIL", "fsspec", "urllib3", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    return progress
