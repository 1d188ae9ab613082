"""The object server with faults on uploads and deletions as well, and the bucket of it that moto keeps."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import boto3

from tests.s3 import server
from tests.s3.client import Bucket, ObjectServer

_ROOT = Path(__file__).resolve().parent.parent.parent


class UploadServer(ObjectServer):
    """The same, run from this file."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.upload_server"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # moto's access log
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{self.port}"


class UploadBucket(Bucket):
    """A bucket in moto."""

    def __init__(self, server: ObjectServer, name: str) -> None:
        super().__init__(server, f"moto-{name}")
        server.call("PUT", f"/{self.name}")

    def get(self, key: str) -> bytes:
        """An object's content."""
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        return bytes(client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def requests(self, *methods: str) -> list[str]:
        """Keys, in the order in which they were asked for with success."""
        log = (server.Request(*line) for line in json.loads(self.server.call("GET", "/__log__")))
        prefix = f"/{self.name}/"
        return [
            request.path.removeprefix(prefix)
            for request in log
            if request.method in methods and request.path.startswith(prefix) and request.status < 300
        ]

    def has_struck(self, key: str) -> bool:
        """Whether a request is being kept waiting by a fault."""
        return f"/{self.name}/{key}" in json.loads(self.server.call("GET", "/__struck__"))


class _Handler(server._Handler):
    struck: ClassVar[list[str]] = []

    def _answer(self) -> None:
        if self.path == "/__struck__":
            self._send(200, json.dumps(self.struck).encode())
        else:
            super()._answer()

    def do_PUT(self) -> None:
        self._change()

    def do_POST(self) -> None:
        if self.path == "/__faults__":
            super().do_POST()
        else:
            self._change()

    def do_DELETE(self) -> None:
        self._change()

    def _change(self) -> None:
        fault = self.state.fault_of(self._key())
        if fault is not None:
            self.struck.append(self._key())
        if fault is not None and fault.stall_at >= 0:
            time.sleep(fault.stall_s)
        if fault is not None and fault.status:
            self._body()
            self._refuse(fault.status, fault.code)
        elif fault is not None and fault.reset_at >= 0:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self._forward()


if __name__ == "__main__":
    server._Handler = _Handler  # type: ignore[misc]
    server.main()
