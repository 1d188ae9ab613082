"""Ends every process of a job when one of them fails, and says which one failed first.

    rank that fails:  write (rank, exit code, traceback) to the store, unless another rank was first -> exit
    every rank:       a thread looks at the store twice a second, also while the main thread is blocked in a
                      collective -> log who was first -> exit with that rank's code

A killed process writes nothing. Its neighbours on the same node see that it is gone and write the record for it;
if it hosted the store, the others see that the store is gone. A rank that hangs is recorded by those that wait for
it, and killed by its neighbours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Self

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from training.distributed.job_end import Failure, JobEnd, end_in_any_case
from training.distributed.store_calls import answer_within

if TYPE_CHECKING:
    from training.distributed.runtime import Runtime

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""One small request per rank: 2,000 a second at 1,024 ranks."""
_CAUSE_S = 2.0
"""How long a rank that only lost a connection waits for the rank that caused it to be named."""
_ACKNOWLEDGE_S = 3.0
"""How long rank 0, whose process may host the store, stays so that all others can read the record."""
_ANSWER_S = 2.0
"""How long a rank that ends the job for a hang waits for the store, whose host may be what hangs."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0
"""Between two looks at a counter of the store. At the end a thousand ranks may wait minutes for the last upload."""
_guards_made = 0


@contextlib.contextmanager
def fail_together(runtime: Runtime) -> Iterator[JobEnd]:
    """Runs the body so that an uncaught error on any rank ends all ranks with a non-zero code. All ranks must enter.

    On the way out it waits for all ranks. ``SystemExit`` with a code other than 0 and ``KeyboardInterrupt`` (130) end
    the job with that code on every rank. A single process just fails as usual.
    """
    if runtime.store is None:
        yield JobEnd()
        return
    with Guard(runtime.store, rank=runtime.rank, world_size=runtime.world_size) as guard:
        yield guard


class _Process(NamedTuple):
    """A process of this node. Its start time tells it from a later one with the same number."""

    pid: int
    started: str


class Guard(JobEnd):
    """The record of the first failure in the store, and the thread that watches it."""

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        super().__init__()
        global _guards_made
        _guards_made += 1  # the n-th guard of one rank belongs to the n-th of every other
        self._rank = rank
        self._world_size = world_size
        # A connection of its own: the process group's may be held by a request that blocks. Ours never do.
        self._store = PrefixStore(f"failure/{_guards_made}", store.clone())
        self._node = f"node/{_process_namespace()}"
        self._neighbours: dict[int, _Process] = {}
        self._stop = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="failure-watch", daemon=True)

    def __enter__(self) -> Self:
        if (process := _process(os.getpid())) is not None:
            seat = self._store.add(f"{self._node}/taken", 1)
            self._store.set(f"{self._node}/{seat}", json.dumps([self._rank, *process]))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave()
        else:
            self._fail(error)

    def fail(self, rank: int, exit_code: int, text: str, silent: Sequence[int] = ()) -> NoReturn:
        """As above; the first failure that was recorded counts."""
        own = Failure(rank, exit_code, text, silent)
        try:
            first = answer_within(_ANSWER_S, lambda: self._claim(own))
        except RuntimeError:  # the store hangs: each rank ends for itself
            self._end(own, store_answers=False)
        self._end(first)

    def _leave(self) -> None:
        """Waits for all ranks, so that none sees another one's orderly end as its death. collective: all ranks."""
        try:
            self._store.set(f"left/{self._rank}", "1")
            self._store.add("leaving", 1)
            self._wait_for("leaving", timeout_s=None)
            self._stop.set()
            self._thread.join()
            self._store.add("gone", 1)
            if self._rank == 0:  # its process may host the store: the others must be done with it
                self._wait_for("gone", timeout_s=_ACKNOWLEDGE_S)
        except RuntimeError as error:
            if not self._stop.is_set():
                self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        """Records this rank's error if it is the first, and ends the process."""
        first = Failure(self._rank, _exit_code(error), _describe(error))
        is_symptom = _is_lost_connection(error)
        try:
            if is_symptom:
                # Of another rank's end. The watching thread may still learn the cause, and ends us then.
                self._wait_for_record(_CAUSE_S)
                first = self._death_on_record() or first
            first = self._claim(first)
        except RuntimeError as store_error:  # the store is gone as well
            if is_symptom:
                first = self._explain_lost_store(store_error)
        self._end(first)

    def _watch(self) -> None:
        """The thread: ends the process when there is a record, and writes one for a neighbour that died silently."""
        while not self._stop.wait(POLL_S):
            try:
                first = self._record() or self._find_dead_neighbour()
            except RuntimeError as error:
                first = self._store_lost(error)
            if first is not None:
                self._end(first)

    def _find_dead_neighbour(self) -> Failure | None:
        self._meet_neighbours()
        for rank, process in self._neighbours.items():
            if _process(process.pid) == process or self._store.check([f"left/{rank}"]):
                continue
            if first := self._record():  # it failed, said so, and ended between our two looks
                return first
            return self._claim(self._explain_death(rank, process.pid))
        return None

    def _explain_death(self, rank: int, pid: int) -> Failure:
        for known_rank, known_pid, exit_code, reason in self.known_deaths():
            if (known_rank, known_pid) == (rank, pid):
                return Failure(rank, exit_code, reason, (rank,))
        text = (
            f"process {pid} on {socket.gethostname()} ended without a Python error: killed by a signal "
            "(kill -9, the scheduler), out of memory (see dmesg), or crashed in native code"
        )
        return Failure(rank, 1, text, (rank,))

    def _meet_neighbours(self) -> None:
        """Remembers the ranks that have arrived on this node since the last look."""
        for seat in range(len(self._neighbours) + 1, self._store.add(f"{self._node}/taken", 0) + 1):
            if not self._store.check([f"{self._node}/{seat}"]):
                return
            rank, pid, started = json.loads(self._store.get(f"{self._node}/{seat}"))
            self._neighbours[rank] = _Process(pid, started)

    def _store_lost(self, error: RuntimeError) -> Failure | None:
        if self._stop.wait(POLL_S):  # an orderly end, seen half way
            return None
        return self._explain_lost_store(error)

    def _explain_lost_store(self, error: RuntimeError) -> Failure:
        """The store's host is gone: rank 0, or the launcher on its node."""
        text = f"its process or the launcher on its node is gone without a word ({_first_line(error)})"
        return self._death_on_record() or Failure(0, 1, text)

    def _death_on_record(self) -> Failure | None:
        """Of a rank that was alone on its node, or hosted the store, only a record in the run directory is left."""
        return next((Failure(rank, code, text) for rank, _, code, text in self.known_deaths()), None)

    def _record(self) -> Failure | None:
        return _decode(self._store.get("first")) if self._store.check(["first"]) else None

    def _claim(self, own: Failure) -> Failure:
        """Writes the record unless there is one; returns the one that counts."""
        return _decode(self._store.compare_set("first", "", json.dumps(own)))

    def _wait_for_record(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._store.check(["first"]):
            time.sleep(0.05)

    def _wait_for(self, counter: str, *, timeout_s: float | None, count: int | None = None) -> None:
        """Until all ranks have counted, or ``count`` of them."""
        enough = self._world_size if count is None else count
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wait_s = _FIRST_WAIT_S
        while self._store.add(counter, 0) < enough and (deadline is None or time.monotonic() < deadline):
            time.sleep(wait_s)
            # Within a limit of seconds it stays short: whoever has to be gone by then waits for us.
            wait_s = min(1.5 * wait_s, _LONGEST_WAIT_S if deadline is None else 5 * _FIRST_WAIT_S)

    def _end(self, first: Failure, *, store_answers: bool = True) -> NoReturn:
        """Says who was first and ends the process, whatever its main thread is waiting for."""
        self._ending.acquire()  # the other thread is on its way here, or has the better reason; it ends us both
        end_in_any_case(first.exit_code)
        whole = self._rank in (first.rank, 0)
        text = first.text.rstrip() if whole else first.text.strip().splitlines()[-1]
        logger.critical("rank %d failed first: %s%s", first.rank, "\n" if whole else "", text)
        for rank in first.silent:
            self._kill_neighbour(rank)
        if store_answers:
            with contextlib.suppress(RuntimeError):
                readers = self._world_size - len(first.silent)
                answer_within(_ACKNOWLEDGE_S + _ANSWER_S, lambda: self._acknowledge(readers))
        self.leave(first.exit_code)

    def _acknowledge(self, readers: int) -> None:
        self._store.add("seen", 1)
        if self._rank == 0:  # its process may host the store
            self._wait_for("seen", count=readers, timeout_s=_ACKNOWLEDGE_S)

    def _kill_neighbour(self, rank: int) -> None:
        process = self._neighbours.get(rank)
        if rank != self._rank and process is not None and _process(process.pid) == process:
            logger.critical("Killing rank %d, process %d, which hangs.", rank, process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def _decode(record: bytes) -> Failure:
    return Failure(*json.loads(record))


def _exit_code(error: BaseException) -> int:
    """What the shell would see; never 0."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code % 256 or 1
    return 1


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"exit with code {error.code}" if isinstance(error.code, int) else str(error.code)
    return "".join(traceback.format_exception(error))


def _is_lost_connection(error: BaseException) -> bool:
    """True for what a collective raises when a peer is gone. Only the order of two reports depends on it."""
    if isinstance(error, DistError | ConnectionError):
        return True
    markers = ("gloo", "nccl", "connection", "socket", "timed out")
    return isinstance(error, RuntimeError) and any(marker in str(error).lower() for marker in markers)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _process_namespace() -> str:
    """The same for two processes that can see each other's process numbers: same boot of the same node or container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: every process for itself, and the collectives notice a death
        return f"{socket.gethostname()}-{os.getpid()}"


def _process(pid: int) -> _Process | None:
    """None if there is no such process, or only its exit status is left of it."""
    try:
        # pid (name) state parent ...; the name may contain anything. Field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else _Process(pid, fields[19])
