"""The tests' side of the object server: starts it, fills it, sets faults, asks what it was asked for."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.s3.server import Fault, Request, fault_line

_ROOT = Path(__file__).resolve().parent.parent.parent
# What a developer's shell or node may say about S3 must not reach the tests.
_FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE")


class ObjectServer:
    """The server process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.s3.server"], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        """One request of the tests themselves."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(method, quote(path), body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        assert answer.status < 300, (method, path, answer.status, data)
        return data

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


class Bucket:
    """One test's bucket: names of objects are relative to it."""

    def __init__(self, server: ObjectServer, name: str) -> None:
        self.server = server
        self.name = name
        self.endpoint = server.endpoint

    def url(self, key: str = "") -> str:
        """The S3 URL of an object."""
        return f"s3://{self.name}/{key}"

    def http_url(self, key: str) -> str:
        """The same object without S3."""
        return f"{self.endpoint}/{self.name}/{quote(key)}"

    def environment(self) -> dict[str, str]:
        """What a process that reads from here needs; empty values take away what the shell had set."""
        return {
            **dict.fromkeys((name for name in _FOREIGN if name in os.environ), ""),
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def put(self, key: str, data: bytes) -> str:
        """Stores an object and returns its URL."""
        self.server.call("PUT", f"/{self.name}/{key}", data)
        return self.url(key)

    def delete(self, key: str) -> None:
        """Removes an object."""
        self.server.call("DELETE", f"/{self.name}/{key}")

    def upload_directory(self, directory: Path, prefix: str = "") -> str:
        """Stores all files of a directory; returns the URL that stands for it."""
        for path in sorted(directory.iterdir()):
            self.put(f"{prefix}{path.name}", path.read_bytes())
        return self.url(prefix).rstrip("/")

    def faults(self, key: str, *faults: Fault) -> None:
        """What happens to the requests for an object from now on; nothing given: nothing."""
        self.server.call("POST", "/__faults__", fault_line(f"/{self.name}/{key}", faults))

    def log(self, key: str | None = None) -> list[Request]:
        """The requests that were answered, in order."""
        lines: list[Any] = json.loads(self.server.call("GET", "/__log__"))
        requests = [Request(*line) for line in lines]
        wanted = f"/{self.name}/" if key is None else f"/{self.name}/{key}"
        return [
            request
            for request in requests
            if request.method in ("GET", "HEAD")
            and (request.path == wanted if key is not None else request.path.startswith(wanted))
        ]

    def bytes_sent(self, key: str) -> int:
        """Of an object, in all answers together."""
        return sum(request.sent for request in self.log(key))
