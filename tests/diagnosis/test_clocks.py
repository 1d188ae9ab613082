"""Clocks are compared over a real connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from training.diagnosis import clocks
from training.diagnosis.clocks import ClockServer, ask_offset


@pytest.fixture
def server() -> Iterator[ClockServer]:
    server = ClockServer()
    yield server
    server.close()


def test_one_clock_agrees_with_itself(server: ClockServer):
    offset = ask_offset("127.0.0.1", server.port)
    assert abs(offset.offset_s) < 0.05
    assert 0 < offset.error_s < 0.05


def test_a_clock_that_is_late_is_measured(server: ClockServer, monkeypatch):
    class Late:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            asks = threading.current_thread() is threading.main_thread()
            return time.time() - (30.0 if asks else 0.0)

    monkeypatch.setattr(clocks, "time", Late)
    assert ask_offset("127.0.0.1", server.port).offset_s == pytest.approx(-30.0, abs=0.1)


def test_who_hangs_up_or_is_not_there_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(ConnectionError):
            ask_offset("127.0.0.1", listener.getsockname()[1])
    # Bound, and nobody listens: a port that was merely given back may be another's by now.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused"):
            ask_offset("127.0.0.1", silent.getsockname()[1])
