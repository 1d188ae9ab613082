"""Set-up shared by all tests: one thread per process and no network, before torch is imported."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Tests run as several processes on few cores, and start processes of their own: more threads only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A launcher's variables in the developer's shell must not turn a single-process test into rank 3 of 8.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
    os.environ.pop(_name, None)

# A shell ignores Ctrl-C on behalf of what it starts in the background, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.s3.fixtures import object_server, s3  # noqa: E402, F401 - fixtures of all tests


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Programs that a test runs in its own process set the level of all logging: not for the next test."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
