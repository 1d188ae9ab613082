"""The process that loader workers are forked from: it has no CUDA context, no network library's state, no threads.

    trainer --Popen--> host --fork--> worker 0, worker 1, ...: sessions of their own, with the commands they run
       |                 stdin: the stream, then a lifeline      host stdout: a line for every worker that ends
       |--- commands (one byte per free slot) ---> worker         worker --- chunks, or its failure ---> trainer

Forking a trainer that has touched a GPU, EFA or a threaded client is what makes other loaders hang; importing torch
anew in every worker is what makes them slow to start and large. When the trainer goes, however it goes, the lifeline
breaks and the host kills the workers; when the host goes, the kernel does.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from training.data.batch_filler import BatchFiller, RankStream
from training.data.ring import BatchRing, RingLayout

_LENGTH = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY = 99
"""Exit status of a worker: another one may find the memory that this one did not."""
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""They are meant for the trainer, which decides when its workers end."""


class HostTask(NamedTuple):
    """What the trainer sends to the host: pickled once, inherited by every worker."""

    stream: RankStream
    layout: RingLayout
    ring_fd: int
    command_fds: tuple[int, ...]
    """Read by the workers, in order."""
    result_fds: tuple[int, ...]
    """Written by the workers, in order."""


class WorkerFailure(NamedTuple):
    """An error that ended a worker."""

    error: BaseException


def send_task(task: bytes, pipe: int) -> None:
    """Writes a pickled ``HostTask`` where the host reads it."""
    view = memoryview(_LENGTH.pack(len(task)) + task)
    while view:
        view = view[os.write(pipe, view) :]


def main() -> None:
    """Forks the workers and waits for the end of the trainer."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s | %(levelname)s | loader worker | %(message)s")
    torch.set_num_threads(1)
    (length,) = _LENGTH.unpack(sys.stdin.buffer.read(_LENGTH.size))
    task: HostTask = pickle.loads(sys.stdin.buffer.read(length))
    workers = [_fork(task, worker) for worker in range(len(task.command_fds))]
    for fd in (*task.command_fds, *task.result_fds):
        os.close(fd)
    watchers = [threading.Thread(target=_report_end, args=item, daemon=True) for item in enumerate(workers)]
    for watcher in watchers:
        watcher.start()
    # A byte: the trainer is done with the workers. Nothing: it is gone. It cannot just close the pipe: processes that
    # were forked from it in the meantime may hold it too.
    sys.stdin.buffer.read(1)
    for pid in workers:
        _kill_session(pid)
    for watcher in watchers:  # a worker that still ran could write into the ring of its successor
        watcher.join()
    os._exit(0)


def _fork(task: HostTask, worker: int) -> int:
    pid = os.fork()
    if pid == 0:
        _run_worker(task, worker)
    return pid


def _run_worker(task: HostTask, worker: int) -> NoReturn:
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    commands, results = task.command_fds[worker], task.result_fds[worker]
    for fd in {*task.command_fds, *task.result_fds} - {commands, results}:
        os.close(fd)
    nowhere = os.open(os.devnull, os.O_RDWR)  # stdin is the lifeline, stdout the host's report
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    connection = Connection(results, readable=False)
    try:
        _fill_batches(task, worker, commands=commands, connection=connection)
    except BrokenPipeError:
        pass  # the trainer is gone
    except BaseException as error:
        if _is_out_of_memory(error):
            os._exit(_OUT_OF_MEMORY)
        _send_failure(connection, error)
    os._exit(0)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _fill_batches(task: HostTask, worker: int, *, commands: int, connection: Connection) -> None:
    ring = BatchRing(task.layout, fd=task.ring_fd)
    filler = BatchFiller(task.stream, worker=worker, num_workers=len(task.command_fds), read_ahead=True)
    slot = 0
    while os.read(commands, 1):  # b"": the trainer has closed its end
        connection.send(filler.fill(ring.buffers(slot)))
        slot = (slot + 1) % task.layout.num_slots


def _send_failure(connection: Connection, error: BaseException) -> None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error of a library whose arguments do not pickle
        error = RuntimeError(f"{type(error).__name__}: {error}")
    connection.send(WorkerFailure(error))


def _report_end(worker: int, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    how = "out of memory" if code == _OUT_OF_MEMORY else f"exit status {code}"
    if code < 0:
        how = f"killed by signal {-code}"
    _kill_session(pid)
    with contextlib.suppress(BrokenPipeError):
        os.write(1, f"worker {worker} (process {pid}): {how}\n".encode())


def _kill_session(leader: int) -> None:
    """Ends a worker, and the commands it has started, also those in process groups of their own."""
    members = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _session(entry) == leader]
    for pid in {leader, *members}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(process: Path) -> int | None:
    """Of a process; None if it has ended, or is a stranger's."""
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def host_command(paths: Sequence[str]) -> list[str]:
    """The command line of a host that imports from the same places as this process."""
    code = f"import sys; sys.path[:] = {list(paths)!r}; from training.data.worker_host import main; main()"
    return [sys.executable, "-c", code]
