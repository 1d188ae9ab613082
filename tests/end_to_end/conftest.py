"""Runs training as its users do: by command line, in this process (fast) or in processes of its own (real)."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest

from tests.faults.nursery_client import REPOSITORY, Rank, shared_nursery
from training.main import main

TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    text: str


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model configuration that trains in milliseconds."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return str(path)


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[Sequence[str]], Outcome]]:
    """Calls main in this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(argv: Sequence[str]) -> Outcome:
        code = 0
        try:
            main(list(argv))
        except SystemExit as stop:
            code = int(stop.code or 0)
        shown = capfd.readouterr()
        return Outcome(code, shown.out + shown.err)

    yield run
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def start_ranks(argv: Sequence[str], *, world_size: int) -> list[Rank]:
    """Starts one process per rank with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(REPOSITORY),
        }
        ranks.append(Rank(shared_nursery(), argv, environment=environment))
    return ranks


def run_ranks_to_end(argv: Sequence[str], *, world_size: int, timeout_s: float = 120) -> list[Outcome]:
    """Runs all ranks to their end; whatever is left after the time limit is killed, and its code is not 0."""
    processes = start_ranks(argv, world_size=world_size)
    outcomes = []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        outcomes.append(Outcome(process.returncode, text))
    return outcomes
