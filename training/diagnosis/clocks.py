"""Compares the clocks of nodes: one of them answers with its time, the others ask several times.

The answer that came back soonest counts; half its journey is how far it may be off (F. Cristian, 1989).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import NamedTuple

_TIME = struct.Struct("!d")
_QUESTIONS = 8
_TIME_LIMIT_S = 5.0


class Offset(NamedTuple):
    """This clock minus the other."""

    offset_s: float
    error_s: float


class ClockServer:
    """Tells its node's time to whoever asks, until it is closed."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), family=_family(), dualstack_ipv6=_family() == socket.AF_INET6)
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="clock-server", daemon=True).start()

    def close(self) -> None:
        """Answers nobody any more."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def ask_offset(host: str, port: int) -> Offset:
    """This node's clock against that of a ``ClockServer``.

    Raises:
        OSError: it cannot be reached.
    """
    best: Offset | None = None
    with socket.create_connection((host, port), timeout=_TIME_LIMIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_QUESTIONS):
            # The clock itself is read once; a clock that only goes forward measures the journey.
            asked_at, left = time.time(), time.perf_counter()
            connection.sendall(b"?")
            told = _receive(connection)
            journey_s = time.perf_counter() - left
            offset = Offset(asked_at + journey_s / 2 - told, journey_s / 2)
            best = offset if best is None or offset.error_s < best.error_s else best
    assert best is not None
    return best


def _answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(_TIME_LIMIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while connection.recv(1):
            connection.sendall(_TIME.pack(time.time()))


def _receive(connection: socket.socket) -> float:
    text = b""
    while len(text) < _TIME.size:
        piece = connection.recv(_TIME.size - len(text))
        if not piece:
            raise ConnectionError("the node that tells the time has hung up")
        text += piece
    seconds: float = _TIME.unpack(text)[0]
    return seconds


def _family() -> socket.AddressFamily:
    return socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
