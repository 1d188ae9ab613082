"""Sees that a run makes no progress, and ends it with the name of the rank that the others wait for.

    every rank: a thread, and how long the rank may go without progress: start-up, step, evaluation
    one of them runs out of time -> asks all -> every rank writes its stacks to RUN/hangs/rank_K.txt and a note
    the notes compared -> the job ends with code 95 and: rank 1 is silent since step 7: ...; rank 0 waits for it in ...

It must not need the main thread, which hangs, nor the others, one of which may be stopped, nor the store, whose host
may be that one. A process whose every thread is stuck is the heartbeat monitor's.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn, Protocol

from training.config import ResilienceConfig
from training.resilience.exit_codes import NODE_SUSPECTED
from training.resilience.hang import Note, Verdict, blame, host_silent

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_ANSWER_S = 5.0
"""A store that hangs may take longer than a poll: that time counts, but no more of it in one turn."""
_SETTLE_S = 4.0
"""How long the notes of all ranks may take: each polls once a second, and writes its stacks first."""
_STAND_IN_S = 3.0
"""How long after that the others wait for the verdict of the rank that posted first."""
_CODE = tuple(str(Path(__file__).resolve().parents[2] / name) for name in ("training", "models"))
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_COLLECTIVES = str(Path(__file__).resolve().parents[1] / "distributed")


class Board(Protocol):
    """Where ranks leave notes for each other. Every method may raise RuntimeError: nobody answers."""

    def asked(self) -> bool: ...
    def post(self, note: str) -> int: ...
    def notes(self) -> dict[int, str]: ...
    def left(self) -> set[int]: ...
    def leave(self) -> None: ...


class Recorder(Protocol):
    """What is known about the collectives of this process."""

    def last(self) -> tuple[str, int, int, bool] | None:
        """Name, number, newest one on the device, whether it is waited for."""

    def write(self, path: Path) -> None: ...


class Watchdog:
    """The thread that counts the seconds without progress. One on every rank."""

    def __init__(
        self,
        config: ResilienceConfig,
        *,
        rank: int,
        world_size: int,
        directory: Path | None,
        board: Board,
        recorder: Recorder,
        end_job: Callable[[int, int, str, tuple[int, ...]], NoReturn],
    ) -> None:
        """Args:
        directory: RUN/hangs; None writes the stacks to stderr.
        end_job: (rank to blame, exit code, text, ranks that cannot end by themselves); does not return.
        """
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._directory = directory
        self._board = board
        self._recorder = recorder
        self._end_job = end_job
        self._step = 0
        self._phase = ("start-up", config.timeout_start)
        self._progress = 0
        """Counts what the main thread has got done; only that thread writes it."""
        self._idle_s = 0.0
        shortest = min(config.timeout_start, config.timeout_step, config.timeout_evaluation)
        self._poll_s = min(_POLL_S, shortest / 10)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """``step`` steps are done. Costs nothing worth measuring."""
        self._step = step
        self._phase = ("step", self._config.timeout_step)
        self._progress += 1

    def start_again(self) -> None:
        """As long as at the start of the job is allowed until the next beat: everything is built anew."""
        self._phase = ("start-up", self._config.timeout_start)
        self._progress += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Allows an evaluation, a save or a rewind its longer time. All ranks must enter it alike."""
        before = self._phase
        self._phase = (name, self._config.timeout_evaluation)
        self._progress += 1
        try:
            yield
        finally:
            self._phase = before
            self._progress += 1

    def close(self) -> None:
        """Watches no more; from here on this rank is not blamed for its silence. A second call does nothing."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._board.leave()

    def _watch(self) -> None:
        """The thread."""
        seen = self._progress
        asking_s = 0.0
        before = time.monotonic()
        while not self._stop.wait(self._poll_s):
            # Time in which this thread did not run either is nobody's hang: a suspended job, a machine under load.
            self._idle_s += asking_s + min(time.monotonic() - before, self._poll_s + _POLL_S)
            if seen != self._progress:
                seen, self._idle_s = self._progress, 0.0
            before = time.monotonic()
            if self._idle_s > self._phase[1] or self._asked():
                self._end()
            asking_s = min(time.monotonic() - before, _ANSWER_S)
            before = time.monotonic()

    def _asked(self) -> bool:
        try:
            return self._board.asked()
        except RuntimeError:  # the failure watch sees a store that is gone; one that hangs shows in our own clock
            return False

    def _end(self) -> NoReturn:
        note = self._look()
        logger.critical(
            "No progress: rank %d, %.0f s in %s after step %d, at %s.",
            *(self._rank, note.idle_s, note.phase, note.step, note.where),
        )
        try:
            self._dump(note)
        except Exception as error:  # a full disk, say; the job has to end all the same
            logger.error("the stacks of rank %d could not be written: %r", self._rank, error)
        try:
            verdict = self._compare(note)
        except RuntimeError as error:
            verdict = host_silent(note, error=str(error))
        shown = f"; stacks of all threads: {self._directory}" if self._directory else ""
        self._end_job(verdict.rank, NODE_SUSPECTED, f"hang: {verdict.text}{shown}", verdict.silent)

    def _look(self) -> Note:
        phase, _ = self._phase
        note = Note(self._rank, self._step, phase, self._idle_s, _where(), host=socket.gethostname(), pid=os.getpid())
        try:
            last = self._recorder.last()
        except Exception as error:  # its format is torch's own business, and differs between releases
            logger.warning("the flight recorder cannot be read: %r", error)
            return note
        if last is None:
            return note
        name, number, started, waiting = last
        return note._replace(collective=name, number=number, started=started, waiting=waiting)

    def _dump(self, note: Note) -> None:
        if self._directory is None:
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        with stack_file(self._directory, self._rank).open("a") as file:
            _write_stacks(file, note)
        self._recorder.write(self._directory / f"rank_{self._rank}.collectives.json")

    def _compare(self, note: Note) -> Verdict:
        """Posts the note, waits for those of the others, and judges."""
        if self._board.post(json.dumps(note)) > 1:
            # One rank reads the notes of a thousand, and ends us all. We stand in for it in case it hangs now.
            time.sleep(_SETTLE_S + _STAND_IN_S)
        deadline = time.monotonic() + _SETTLE_S
        while True:
            notes, left = self._board.notes(), self._board.left()
            if len(notes.keys() | left) == self._world_size or time.monotonic() > deadline:
                break
            time.sleep(min(0.1, self._poll_s))
        return blame([Note(*json.loads(text)) for text in notes.values()], world_size=self._world_size, left=left)


def stack_file(directory: Path, rank: int) -> Path:
    """Where the stacks of a rank that hangs are written."""
    return directory / f"rank_{rank}.txt"


def _write_stacks(file: IO[str], note: Note) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"{now} rank {note.rank} (process {note.pid} on {note.host}): {note.idle_s:.0f} s without progress\n")
    file.write(f"step {note.step}, phase {note.phase}, at {note.where}\n")
    if note.collective:
        state = "waits for it" if note.waiting else "done"
        file.write(f"last collective: {note.collective} #{note.number} ({state})\n")
    file.flush()
    faulthandler.dump_traceback(file=file, all_threads=True)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())


def _where() -> str:
    """The innermost line of ours that the main thread is in, or of anybody's but the libraries'."""
    innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    if innermost is None:
        return "an unknown place"
    frames = list(_outwards(innermost))
    ours = [frame for frame in frames if frame.f_code.co_filename.startswith(_CODE)]
    callers = [frame for frame in ours if not frame.f_code.co_filename.startswith(_COLLECTIVES)]
    others = [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
    frame = (callers or ours or others or frames)[0]
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def _outwards(innermost: FrameType) -> Iterator[FrameType]:
    frame: FrameType | None = innermost
    while frame is not None:
        yield frame
        frame = frame.f_back
