"""The ledger keeps everything, survives a crash in the middle of a line, and a full disk does not stop the run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from training.observability.events import EventLog, read_events


class Sink:
    def __init__(self) -> None:
        self.written: list[tuple[int, Mapping[str, float]]] = []

    def write(self, step: int, metrics: Mapping[str, float], *, epoch: int | None = None) -> None:
        self.written.append((step, metrics))

    def close(self) -> None:
        pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def places(path: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["event"]) for event in read_events(path)]


def test_every_event_is_one_line_with_step_time_and_details(path):
    log = EventLog(path, 0)
    log.write(7, "skipped", reason="loss high", samples=["a", "b"], loss=2.5)
    log.close()
    (line,) = path.read_text().splitlines()
    event = json.loads(line)
    assert list(event) == ["step", "time", "event", "reason", "samples", "loss"]
    assert (event["step"], event["samples"]) == (7, ["a", "b"])


def test_an_event_can_be_read_at_once(path):
    log = EventLog(path, 0)
    log.write(1, "skipped")
    assert places(path) == [(1, "skipped")]
    log.close()


def test_what_is_not_finite_is_written_as_text(path):
    log = EventLog(path, 0)
    log.write(1, "skipped", loss=math.nan, more={"grad": [math.inf, 1.0]})
    log.close()
    (event,) = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (event["loss"], event["more"]) == ("nan", {"grad": ["inf", 1.0]})


def test_a_resumed_run_keeps_what_was_written_and_says_where_it_starts_again(path):
    for first_step, steps in ((0, (10, 20)), (15, (30,)), (31, (40,))):
        log = EventLog(path, first_step)
        for step in steps:
            log.write(step, "skipped")
        log.close()
    expected = [(10, "skipped"), (20, "skipped"), (15, "resumed"), (30, "skipped"), (40, "skipped")]
    assert places(path) == expected


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(path):
    path.write_text('{"step": 1, "event": "skipped"}\n{"step": 2, "eve')
    log = EventLog(path, 5)
    log.write(6, "damp")
    log.close()
    assert places(path) == [(1, "skipped"), (6, "damp")]
    assert len(path.read_text().splitlines()) == 3


def test_sinks_get_the_count_of_each_event_which_goes_on_after_a_restart(path):
    sink = Sink()
    log = EventLog(path, 0, sinks=[sink])
    for step in (3, 4):
        log.write(step, "skipped")
    log.close()
    log = EventLog(path, 9, sinks=[sink])
    log.write(9, "skipped")
    log.close()
    assert sink.written == [(3, {"guard/skipped": 1}), (4, {"guard/skipped": 2}), (9, {"guard/skipped": 3})]


class HalfADisk(io.RawIOBase):
    """Takes ten bytes, and then what comes."""

    def __init__(self, real: io.FileIO) -> None:
        self._real, self._first = real, True

    def write(self, data: bytes) -> int:
        data, self._first = (data[:10] if self._first else data), False
        return self._real.write(data)


def test_a_line_cut_by_a_full_disk_does_not_swallow_the_next(path, caplog):
    log = EventLog(path, 0)
    log._file = HalfADisk(log._file)
    for step in (1, 2, 3):
        log.write(step, "skipped")
    assert places(path) == [(2, "skipped"), (3, "skipped")]
    assert "10 of" in caplog.records[0].message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_the_line_and_not_the_run(path, caplog):
    log = EventLog(path, 0)
    log._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        log._file = full
        log.write(1, "skipped", reason="kept in the log at least")
        log.write(2, "skipped")
        log.close()
    assert "could not be written" in caplog.records[0].message
    assert "kept in the log at least" in caplog.records[0].message
    assert caplog.records[-1].message == "2 events could not be written."
