"""Kills a training process that shows no sign of life; started by the process itself, beside it.

    rank: a thread writes a byte a second --pipe--> monitor: none for the timeout -> ask for the stacks -> kill

A process that is stopped, or whose interpreter is held by native code, cannot see that by itself. This one has the
standard library only, and ends with the rank. What it knows it says on stderr, the job's log, and in
RUN/hangs/rank_K.killed.json, where the neighbours find the reason of a death.

Seconds are counted by the monitor's own turns: where it did not run either, the machine was suspended or overloaded,
and that is no hang of the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

DUMP_SIGNAL: int = getattr(signal, "SIGRTMIN", signal.SIGQUIT)
"""The rank's faulthandler writes all stacks when it arrives, in C, whoever holds the interpreter."""
DONE = b"q"
"""Instead of a beat: the rank needs nobody any more."""
_BEATS = 0
"""Standard input."""
_DUMP_S = 1.0
"""How long writing the stacks may take, at most."""


class Task(NamedTuple):
    """What is watched, and how."""

    rank: int
    pid: int
    timeout_s: float
    dump_fd: int
    """Where the stacks of the rank can be read after the signal."""
    directory: str
    """RUN/hangs; empty if nothing is written."""


def main(arguments: list[str]) -> None:
    """Watches until the rank is done, has ended, or is killed."""
    rank, pid, timeout_s, dump_fd, directory = arguments
    task = Task(int(rank), int(pid), float(timeout_s), int(dump_fd), directory)
    tick_s = min(1.0, task.timeout_s / 10)
    silent_s, last = 0.0, time.monotonic()
    while os.getppid() == task.pid:
        beat = _read(_BEATS, tick_s)
        if beat is not None and (not beat or beat.endswith(DONE)):
            return
        now = time.monotonic()
        silent_s = 0.0 if beat else silent_s + min(now - last, 2 * tick_s)
        last = now
        if silent_s >= task.timeout_s:
            if not _is_debugged(task.pid):
                _kill(task)
            silent_s, last = 0.0, time.monotonic()


def _kill(task: Task) -> None:
    """Also if the process should wake up now: the signal that asks for the stacks interrupts what it waits for."""
    state = _status(task.pid, "State")
    stopped = state.startswith("T")
    if not stopped:  # a stopped process would write its stacks after it was woken, and stand where it was stopped
        os.kill(task.pid, DUMP_SIGNAL)
    stacks = b"" if stopped else _read_stacks(task.dump_fd, min(_DUMP_S, task.timeout_s / 2))
    text = (
        f"rank {task.rank} (process {task.pid} on {socket.gethostname()}) gave no sign of life for "
        f"{task.timeout_s:g} s ({_explain(state)}) and was killed; see --timeout-heartbeat"
    )
    _report(task, text, stacks)  # before the kill: the neighbours look for it as soon as the process is gone
    if os.getppid() == task.pid:  # the number has not become another process's
        os.kill(task.pid, signal.SIGKILL)


def _report(task: Task, text: str, stacks: bytes) -> None:
    log = f"CRITICAL | heartbeat monitor | {text}\n".encode()
    with contextlib.suppress(OSError):  # a full disk or a closed log keeps nothing alive
        os.write(2, log if task.directory else log + stacks)
    if not task.directory:
        return
    directory = Path(task.directory)
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"rank_{task.rank}.txt").open("ab") as file:
            file.write(f"{text}\n".encode() + stacks + b"\n")
        record = {"rank": task.rank, "pid": task.pid, "text": text}
        partial = directory / f".rank_{task.rank}.killed.partial"
        partial.write_text(json.dumps(record) + "\n")
        partial.replace(directory / f"rank_{task.rank}.killed.json")


def _read_stacks(fd: int, timeout_s: float) -> bytes:
    """What arrives until nothing more does; a pipe is smaller than the stacks of many threads."""
    stacks, deadline = b"", time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0:
        part = _read(fd, left_s if not stacks else min(left_s, 0.2))
        if not part:
            break
        stacks += part
    return stacks


def _read(fd: int, timeout_s: float) -> bytes | None:
    """None if nothing arrives in time, nothing if nobody is left to write."""
    return os.read(fd, 65536) if select.select([fd], [], [], timeout_s)[0] else None


def _is_debugged(pid: int) -> bool:
    return _status(pid, "TracerPid") not in ("", "0")


def _explain(state: str) -> str:
    if state.startswith("T"):
        return "it is stopped by a signal, such as SIGSTOP"
    if state.startswith("D"):
        return "it waits in the kernel for a device or a file system"
    return "native code holds the interpreter"


def _status(pid: int, name: str) -> str:
    """A line of /proc/PID/status; empty if it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:")), "")


if __name__ == "__main__":
    main(sys.argv[1:])
