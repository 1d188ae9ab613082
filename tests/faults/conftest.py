"""Every test of faults gets a lab of its own, and the record of an undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.lab import Lab, Record, prepare_data
from tests.faults.nursery_client import Nursery, shared_nursery


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    return shared_nursery()


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("fault-data"))


@pytest.fixture
def lab(tmp_path: Path, nursery: Nursery, fault_data: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, nursery, data=fault_data)
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery, fault_data: Path) -> Callable[..., Record]:
    """The record of a run to which nothing happens, made once for each set of further flags."""
    lab = Lab(tmp_path_factory.mktemp("undisturbed"), nursery, data=fault_data)
    known: dict[tuple[str, ...], Record] = {}

    def record(*more: str) -> Record:
        if more not in known:
            name = f"undisturbed-{len(known)}"
            lab.finish(name, *more)
            known[more] = lab.record(name)
        return known[more]

    return record
