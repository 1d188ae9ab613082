"""An object server for tests, in a process of its own: S3 and plain HTTP over a socket, with faults on demand.

    PUT /BUCKET/KEY         stores an object      POST /__faults__   {"path": ..., "faults": [...]}
    GET, HEAD /BUCKET/KEY   Range, If-Match       GET  /__log__      [[method, path, range, ...], ...]
    /moto-*/KEY             passed on to moto, which speaks all of S3 and checks signatures if asked to

Objects lie in memory, so that the server is fast enough to measure clients against. It ends with the process that
started it: its standard input is the lifeline.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

_BLOCK_BYTES = 256 << 10
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"})


@dataclass
class Fault:
    """What happens to requests for a path. Bytes are counted in the body of one answer."""

    times: int = 1_000_000
    """Requests that it strikes."""
    after: int = 0
    """Requests that pass first."""
    status: int = 0
    """Instead of the object; with ``code`` in S3's XML."""
    code: str = "Injected"
    reset_at: int = -1
    """The connection is reset after so many bytes."""
    short_at: int = -1
    """The connection ends in order after so many bytes, fewer than announced."""
    stall_at: int = -1
    stall_s: float = 60.0
    trickle_bytes: int = 0
    """So many at a time, one every ``trickle_s``."""
    trickle_s: float = 0.1
    replace_with: str = ""
    """A path: from now on its object is served, with its ETag."""
    ignore_if_match: bool = False
    """As a plain web server may: the client has to look at the ETag itself."""


class Request(NamedTuple):
    """One line of the log."""

    method: str
    path: str
    range: str
    status: int
    sent: int
    credential: str
    """The access key that signed it; empty if nobody did."""


class _Object(NamedTuple):
    data: bytes
    etag: str


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, _Object] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.log: list[Request] = []

    def fault_of(self, path: str) -> Fault | None:
        """The first fault of the path that still strikes."""
        with self.lock:
            for fault in self.faults.get(path, ()):
                if fault.after > 0:
                    fault.after -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


@lru_cache(maxsize=1)
def _moto_address() -> tuple[str, int]:
    """Starts moto on first use: importing it takes seconds."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return host, port


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: ClassVar[_State] = _State()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        if self.path.startswith("/moto-"):
            self._forward()
            return
        data = self._body()
        self.state.objects[self._key()] = _Object(data, f'"{hashlib.md5(data).hexdigest()}"')
        self._send(200, b"")

    def do_POST(self) -> None:
        if self.path == "/__faults__":
            wanted = json.loads(self._body())
            with self.state.lock:
                self.state.faults[wanted["path"]] = [Fault(**fault) for fault in wanted["faults"]]
            self._send(200, b"")
        else:
            self._forward()

    def do_DELETE(self) -> None:
        if self.path.startswith("/moto-"):
            self._forward()
            return
        self.state.objects.pop(self._key(), None)
        self._send(204, b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> None:
        if self.path == "/__log__":
            self._send(200, json.dumps(self.state.log).encode())
            return
        fault = self.state.fault_of(self._key())
        if fault is not None and fault.replace_with:
            self.state.objects[self._key()] = self.state.objects[fault.replace_with]
            fault = Fault(ignore_if_match=fault.ignore_if_match)
        if fault is not None and fault.status:
            self._refuse(fault.status, fault.code)
        elif self.path.startswith("/moto-"):
            self._forward(fault)
        else:
            self._serve(fault)

    def _serve(self, fault: Fault | None) -> None:
        found = self.state.objects.get(self._key())
        if found is None:
            self._refuse(404, "NoSuchKey")
            return
        wanted = self.headers.get("If-Match")
        if wanted is not None and wanted != found.etag and not (fault is not None and fault.ignore_if_match):
            self._refuse(412, "PreconditionFailed")
            return
        size = len(found.data)
        headers = {"ETag": found.etag, "Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT", "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, memoryview(found.data), headers, fault)
            return
        start, end = int(match[1]), min(size, int(match[2] or size - 1) + 1)
        if start >= size:
            self._refuse(416, "InvalidRange")
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._send(206, memoryview(found.data)[start:end], headers, fault)

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        self._send(status, body.encode(), {"Content-Type": "application/xml"})

    def _forward(self, fault: Fault | None = None) -> None:
        connection = http.client.HTTPConnection(*_moto_address())
        headers = dict(self.headers.items())  # with the Host that was signed
        connection.request(self.command, self.path, self._body(), headers)
        answer = connection.getresponse()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        length = int(answer.getheader("Content-Length") or 0)
        self._send(answer.status, answer.read(), kept, fault, length=length)
        connection.close()

    def _send(
        self,
        status: int,
        body: bytes | memoryview,
        headers: dict[str, str] | None = None,
        fault: Fault | None = None,
        *,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length if self.command == "HEAD" and length is not None else len(body)))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                for block in self._blocks(memoryview(body), fault or Fault()):
                    self.connection.sendall(block)
                    sent += len(block)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        if not self.path.startswith("/__"):
            credential = re.search(r"Credential=([^/]+)", self.headers.get("Authorization", ""))
            key, range_ = self._key(), self.headers.get("Range", "")
            with self.state.lock:
                self.state.log.append(
                    Request(self.command, key, range_, status, sent, credential[1] if credential else "")
                )

    def _blocks(self, body: memoryview, fault: Fault) -> Any:
        """The body in pieces, as the fault lets them through."""
        at = 0
        stops = (fault.reset_at, fault.short_at, fault.stall_at)
        while at < len(body):
            end = at + (fault.trickle_bytes or _BLOCK_BYTES)
            end = min([len(body), end, *(stop for stop in stops if stop > at)])
            if at in stops:
                self._strike(at, fault)
                if self.close_connection:
                    return
            yield body[at:end]
            at = end
            if fault.trickle_bytes and at < len(body):
                time.sleep(fault.trickle_s)

    def _strike(self, at: int, fault: Fault) -> None:
        if at == fault.stall_at:
            time.sleep(fault.stall_s)
            return
        self.close_connection = True
        if at == fault.reset_at:  # unsent data are thrown away, and the other side gets RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request: Any) -> None:
        """A connection that was reset is gone already."""
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what this server is for."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(request, client_address)


def fault_line(path: str, faults: tuple[Fault, ...]) -> bytes:
    """The body of POST /__faults__."""
    return json.dumps({"path": path, "faults": [asdict(fault) for fault in faults]}).encode()


def main() -> None:
    """Serves until standard input ends; the first line of output is the port."""
    server = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
