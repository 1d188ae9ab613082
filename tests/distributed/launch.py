"""Runs a function on several real processes, as ranks of a gloo group, and brings results and errors back."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.config import EngineConfig
from training.distributed.runtime import close_runtime, start_runtime

# A server that has imported torch once forks the ranks: 0.1 s each instead of 4 s. It has run nothing, so its copies
# have no threads that the fork could lose.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["training.train_step", "training.losses", "training.distributed.parallelize", "training.optim.optimizer"]


class RankError(AssertionError):
    """A rank raised; the message is its traceback."""


class _Report(NamedTuple):
    rank: int
    value: Any
    error: str | None


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """``function(*arguments)`` on each rank of a gloo group on the CPU; returns the results in rank order.

    The function is imported by name in the ranks (a function of a test module will do); arguments and results are
    pickled. Inside, ``training.distributed.collectives`` works, and ``current_runtime()`` is the rank's Runtime.
    With ``world_size`` 1 the function runs in one process of its own, without a group.

    Raises:
        RankError: a rank raised (its traceback is the message), died, or did not finish in time.
    """
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    readers = [reader for reader, _ in pipes]
    ranks = start_ranks(world_size, _report, function, arguments, own=[writer for _, writer in pipes])
    for _, writer in pipes:
        writer.close()
    try:
        reports = _collect(readers, deadline=time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
            process.join()
    return [report.value for report in sorted(reports)]


def start_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    own: Sequence[Any] | None = None,
    stderr: Sequence[Path] | None = None,
) -> list[ForkServerProcess]:
    """Starts ``function(*arguments)`` in one process per rank, with the variables that torchrun would set.

    Args:
        own: one more argument for each rank, in rank order.
        stderr: the file that each rank's standard error goes to.
    """
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    port = free_port()
    processes = []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port)
        extra = () if own is None else (own[rank],)
        file = None if stderr is None else str(stderr[rank])
        process = _CONTEXT.Process(target=_begin, args=(environment, file, function, (*arguments, *extra)), daemon=True)
        process.start()
        processes.append(process)
    return processes


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set on one node."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}


def current_runtime() -> Any:
    """The Runtime of the rank this code runs on."""
    return _current[-1]


_current: list[Any] = []


def _collect(readers: list[Connection], *, deadline: float) -> list[_Report]:
    reports: list[_Report] = []
    waiting = list(readers)
    while waiting:
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {[readers.index(reader) for reader in waiting]} did not finish in time")
        for reader in ready:
            waiting.remove(reader)
            try:
                report = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankError(f"rank {readers.index(reader)} died without a report") from None
            if report.error is not None:
                raise RankError(f"rank {report.rank} raised:\n{report.error}")
            reports.append(report)
    return reports


def _begin(
    environment: dict[str, str], stderr: str | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """The first thing a rank does."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if stderr is not None:
        # The descriptor, not sys.stderr: what native code and a dying interpreter write is caught as well.
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    function(*arguments)


def _report(function: Callable[..., Any], arguments: tuple[Any, ...], writer: Connection) -> None:
    rank = int(os.environ["RANK"])
    try:
        runtime = start_runtime(EngineConfig(device="cpu"))
        _current.append(runtime)
        writer.send_bytes(pickle.dumps(_Report(rank, function(*arguments), None)))
        close_runtime(runtime)
    except BaseException:
        writer.send_bytes(pickle.dumps(_Report(rank, None, traceback.format_exc())))
        sys.exit(1)
