"""The notes of a big world are read in few requests, so that a store that is busy is not taken for one that hangs."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed import HashStore

from training.distributed import failure, hang_board
from training.distributed.hang_board import HangBoard


class Counted:
    """Counts requests."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self._store, name)


@pytest.fixture
def boards() -> list[HangBoard]:
    """Of all ranks of a world of 64, on one store."""
    store = Counted(HashStore())
    made = []
    for rank in range(64):
        board = object.__new__(HangBoard)
        board._rank, board._world_size, board._own, board._store = rank, 64, {}, store
        made.append(board)
    return made


def requests_of(board: HangBoard, read: Any) -> tuple[Any, int]:
    before = board._store.requests
    return read(), board._store.requests - before


def test_notes_of_all_ranks_take_a_few_requests(boards):
    for board in boards:
        board.post(f"note of {board._rank}")
    notes, requests = requests_of(boards[0], boards[0].notes)
    assert notes == {rank: f"note of {rank}" for rank in range(64)}
    assert requests <= 3


def test_nobody_that_left_takes_one_request_and_all_of_them_a_few(boards):
    assert requests_of(boards[0], boards[0].left) == (set(), 1)
    for board in boards:
        board.leave()
    left, requests = requests_of(boards[0], boards[0].left)
    assert left == set(range(64))
    assert requests <= 2


def test_notes_of_all_ranks_but_one_take_few_requests_too(boards):
    for board in boards[:41] + boards[42:]:
        board.post("here")
    notes, requests = requests_of(boards[0], boards[0].notes)
    assert set(range(64)) - notes.keys() == {41}
    assert requests <= 2 + 13  # two halves of each size


def test_some_notes_and_some_that_left_are_found(boards):
    for board in boards[3:7]:
        board.post("here")
        board.leave()
    assert boards[0].notes() == dict.fromkeys(range(3, 7), "here")
    assert boards[0].left() == {3, 4, 5, 6}


def test_reading_a_big_world_may_take_longer_than_a_small_one(boards, monkeypatch):
    allowed = []
    monkeypatch.setattr(hang_board, "answer_within", lambda timeout_s, request: allowed.append(timeout_s) or request())
    for world_size in (2, 3000):
        boards[0]._world_size = world_size
        boards[0].notes()
    assert allowed[0] < 3.1
    assert allowed[1] > 10


def test_a_long_wait_asks_the_store_once_a_second(monkeypatch):
    """For the others at the end of a job, with rank 0's last upload under way."""
    waits: list[float] = []
    monkeypatch.setattr(failure.time, "sleep", waits.append)
    guard = object.__new__(failure.Guard)
    guard._world_size = 2

    def add(counter: str, number: int) -> int:
        return 2 if sum(waits) > 60 else 1

    guard._store = type("Store", (), {"add": staticmethod(add)})()  # type: ignore[assignment]
    guard._wait_for("leaving", timeout_s=None)
    assert (waits[0], waits[-1]) == (0.02, 1.0)
    assert len(waits) < 75
