"""``s3``: an object server for the whole test run and a bucket for each test. Tests that do not ask pay nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.s3.client import Bucket, ObjectServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """The server process."""
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def s3(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, and this process's environment set to read from it."""
    bucket = Bucket(object_server, f"bucket-{next(_numbers)}")
    for name, value in bucket.environment().items():
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    return bucket
