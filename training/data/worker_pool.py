"""The trainer's side of its loader workers: hands out free slots of the ring and collects what was written there.

Every worker writes its rows of every batch, so a batch is whole when all of them have reported. Workers run ahead of
the trainer as far as the ring has free slots.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import IO

from training.data.batch import BatchBuffers
from training.data.batch_filler import Chunk, RankStream
from training.data.ring import BatchRing, RingLayout
from training.data.worker_host import HostTask, WorkerFailure, host_command, send_task

_LAST_WORDS_S = 1.0
# Few arenas: the threads that read ahead would keep one each.
_HOST_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


class WorkerDied(RuntimeError):
    """A worker process ended without saying why: killed from outside, or out of memory."""


class WorkerPool:
    """The worker processes of one rank and their ring."""

    def __init__(self, stream: RankStream, *, layout: RingLayout, num_workers: int, ring: BatchRing) -> None:
        self._layout = layout
        self._ring = ring
        self._slot = 0
        command_ends = [os.pipe() for _ in range(num_workers)]
        result_ends = [os.pipe() for _ in range(num_workers)]
        task = HostTask(
            stream, layout, ring.fd, tuple(read for read, _ in command_ends), tuple(write for _, write in result_ends)
        )
        theirs = (*task.command_fds, *task.result_fds)
        self._host = subprocess.Popen(
            host_command(sys.path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(ring.fd, *theirs),
            env=os.environ | _HOST_ENVIRONMENT,
        )
        for fd in theirs:
            os.close(fd)
        self._commands = [write for _, write in command_ends]
        self._results = [Connection(read, writable=False) for read, _ in result_ends]
        with contextlib.suppress(BrokenPipeError):  # a host that could not start: the first batch will say so
            send_task(pickle.dumps(task, protocol=pickle.HIGHEST_PROTOCOL), _pipe(self._host.stdin).fileno())
        for _ in range(layout.num_slots):
            self.release()

    def next_batch(self) -> tuple[BatchBuffers, list[Chunk]]:
        """The next slot's tensors and what the workers reported of them; the slot stays theirs until ``release``.

        Raises:
            WorkerDied: a worker is gone. Whatever error ended a worker.
        """
        chunks = [self._receive(worker) for worker in range(len(self._results))]
        buffers = self._ring.buffers(self._slot)
        self._slot = (self._slot + 1) % self._layout.num_slots
        return buffers, chunks

    def release(self) -> None:
        """Lets the workers write to the slot that was handed out longest ago."""
        for command in self._commands:
            with contextlib.suppress(BrokenPipeError):  # the worker is gone, which the next batch will tell
                os.write(command, b"+")

    def close(self) -> None:
        """Ends the workers at once, whatever they are doing."""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self._host.stdin).write(b".")
        _pipe(self._host.stdin).close()
        for command in self._commands:
            os.close(command)
        for result in self._results:
            result.close()
        try:
            self._host.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._host.kill()
            self._host.wait()
        _pipe(self._host.stdout).close()

    def _receive(self, worker: int) -> Chunk:
        try:
            message: Chunk | WorkerFailure = self._results[worker].recv()
        except (EOFError, OSError):  # the latter in the middle of a message
            raise WorkerDied(f"Data loading stopped: {self._last_words(worker)}.") from None
        if isinstance(message, WorkerFailure):
            raise message.error
        return message

    def _last_words(self, worker: int) -> str:
        """What the host knows of the end of a worker."""
        lines = b"".join(self._host_output(worker)).decode(errors="replace").strip().replace("\n", "; ")
        return lines or f"worker {worker} and the process that started it are gone"

    def _host_output(self, worker: int) -> Iterator[bytes]:
        stdout = _pipe(self._host.stdout)
        end = time.monotonic() + _LAST_WORDS_S
        while wait([stdout.fileno()], max(0.0, end - time.monotonic())):
            text = stdout.read(4096)
            yield text
            if not text or f"worker {worker} ".encode() in text:
                return


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
