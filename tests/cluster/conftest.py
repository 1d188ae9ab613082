"""Tests on a real SLURM: where ``sinfo`` answers, one after another; elsewhere they are skipped with a reason."""

from __future__ import annotations

import fcntl
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, answers

_REQUIRED = "CLIPYARD_REQUIRE_SLURM"
"""Set where a missing SLURM is a failure: in CI, which starts one."""
_TIME_LIMIT_S = 900
"""For one test, with its wait for those that other pytest processes run on the same cluster."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(_TIME_LIMIT_S))


@pytest.fixture(scope="session")
def answering_slurm() -> None:
    reason = answers()
    if not reason:
        return
    reason = (
        f'{reason}: start one with tests/cluster/slurm-sandbox.sh up, then eval "$(tests/cluster/slurm-sandbox.sh env)"'
    )
    if os.environ.get(_REQUIRED):
        pytest.fail(f"{_REQUIRED} is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def cluster(answering_slurm: None, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster for one test alone; its jobs run in ``tmp_path``, which all nodes see."""
    name = f"clipyard-cluster-{zlib.crc32(os.environ.get('SLURM_CONF', '').encode())}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster = Cluster(tmp_path)
        yield cluster
        cluster.clean_up()
