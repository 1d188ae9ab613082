"""Small jobs that hang on purpose, for real processes."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from training.config import EngineConfig, ResilienceConfig
from training.distributed.collectives import all_reduce_sum
from training.distributed.failure import fail_together
from training.distributed.flight_recorder import FlightRecorder
from training.distributed.hang_board import HangBoard
from training.distributed.runtime import close_runtime, start_runtime
from training.resilience.heartbeat import Heartbeat, killed_ranks
from training.resilience.watchdog import Watchdog

HANG_AFTER = 7
STEPS = 12


def train(hang: str, culprit: int, hangs: Path, timeout_s: float, heartbeat_s: float = 0.0) -> None:
    """Some steps, each with a collective; one rank hangs in the eighth."""
    config = ResilienceConfig(timeout_start=30, timeout_step=timeout_s, timeout_evaluation=30)
    runtime = start_runtime(EngineConfig(device="cpu"))
    with fail_together(runtime) as job_end:
        watchdog = Watchdog(
            config,
            rank=runtime.rank,
            world_size=runtime.world_size,
            directory=hangs,
            board=HangBoard(runtime),
            recorder=FlightRecorder(),
            end_job=job_end.fail,
        )
        heartbeat = Heartbeat(heartbeat_s, rank=runtime.rank, directory=hangs)
        job_end.known_deaths = partial(killed_ranks, hangs)
        for step in range(STEPS):
            if runtime.rank == culprit and step == HANG_AFTER:
                _HANGS[hang]()
            all_reduce_sum(torch.ones(1))
            watchdog.beat(step + 1)
            time.sleep(0.1)  # the neighbours have to meet
        watchdog.close()
        heartbeat.close()
    close_runtime(runtime)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_in_a_step() -> None:
    time.sleep(60)


def wait_for_data() -> None:
    queue.Queue[None]().get()


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(60)


def nothing() -> None:
    pass


_HANGS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (stop_itself, sleep_in_a_step, wait_for_data, hold_the_interpreter, nothing)
}
