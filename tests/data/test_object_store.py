"""What our client says to a server and understands of its answers, on a server that notes every connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

import pytest

from training.data.object_chunks import ahead_budget
from training.data.storage import AccessDenied, ShardChanged, Storage, StorageError, StorageOptions

DATA = Random(3).randbytes(900_000)
QUICK = StorageOptions(attempts=3, first_delay_s=0.01, longest_delay_s=0.02, chunk_bytes=100_000)


@dataclass
class Answer:
    """To one request; status 0: the range asked for."""

    status: int = 0
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Notes:
    """What the server saw, and what it says."""

    url: str
    connections: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)
    answer: Callable[[str, int], Answer] = lambda path, number: Answer()


@pytest.fixture
def server() -> Iterator[Notes]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            notes.connections += 1

        def do_GET(self) -> None:
            notes.requests.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            answer = notes.answer(self.path, len(notes.requests))
            if not answer.status:
                start, end = self.headers["Range"].removeprefix("bytes=").split("-")
                answer.body = DATA[int(start) : int(end) + 1]
                answer.headers["Content-Range"] = f"bytes {start}-{int(start) + len(answer.body) - 1}/{len(DATA)}"
            self.send_response(answer.status or 206)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

        def do_HEAD(self) -> None:
            self.send_response(403)
            self.send_header("x-amz-bucket-region", "eu-west-3")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    notes = Notes(f"http://127.0.0.1:{http_server.server_port}")
    thread = threading.Thread(target=http_server.serve_forever, args=(0.02,))
    thread.start()
    yield notes
    http_server.shutdown()
    thread.join()
    http_server.server_close()


def test_connections_are_kept_for_the_next_range_and_the_next_shard(server: Notes) -> None:
    for name in ("a", "b", "c"):
        assert Storage(QUICK).read_bytes(f"{server.url}/{name}.tar") == DATA
    assert len(server.requests) == 27
    assert server.connections <= 6


def test_many_streams_share_what_may_be_fetched_ahead(server: Notes) -> None:
    storage = Storage(replace(QUICK, ahead_bytes=450_000))
    with ExitStack() as streams:
        opened = [streams.enter_context(storage.open(f"{server.url}/{number}.tar")) for number in range(6)]
        assert ahead_budget.used == 400_000
        assert len(server.requests) <= 6 + 4
        assert [stream.read(1_000_000) for stream in opened] == [DATA] * 6
        assert ahead_budget.used == 0
        with storage.open(f"{server.url}/a.tar") as left_early:
            left_early.skip(150_000)
            assert ahead_budget.used > 0
    assert ahead_budget.used == 0


def test_later_ranges_are_bound_to_the_first_etag(server: Notes) -> None:
    server.answer = lambda path, number: Answer(headers={"ETag": '"one"'})
    Storage(QUICK).read_bytes(f"{server.url}/a.tar")
    assert [request.get("if-match") for request in server.requests] == [None] + ['"one"'] * 8


@pytest.mark.parametrize("etags", [('W/"one"', 'W/"one"'), (None, None)])
def test_weak_and_missing_etags_are_not_sent_back(server: Notes, etags: tuple[str | None, str | None]) -> None:
    server.answer = lambda path, number: Answer(headers={"ETag": etags[0]} if etags[0] else {})
    assert Storage(QUICK).read_bytes(f"{server.url}/a.tar") == DATA
    assert {request.get("if-match") for request in server.requests} == {None}


@pytest.mark.parametrize(("first", "then"), [('W/"one"', 'W/"two"'), ('"one"', '"two"'), ('"one"', "")])
def test_another_etag_is_noticed_even_if_the_server_does_not(server: Notes, first: str, then: str) -> None:
    server.answer = lambda path, number: Answer(headers={"ETag": first if number < 4 else then})
    with pytest.raises(ShardChanged, match="changed while it was read"):
        Storage(QUICK).read_bytes(f"{server.url}/a.tar")


def test_signed_urls_keep_their_query_and_show_it_to_nobody(server: Notes) -> None:
    url = f"{server.url}/d/a.tar?X-Signature=secret%2Fabc&Expires=1"
    assert Storage(QUICK).read_bytes(url) == DATA
    assert {request["path"] for request in server.requests} == {"/d/a.tar?X-Signature=secret%2Fabc&Expires=1"}
    for status, error in ((403, AccessDenied), (400, StorageError), (503, StorageError)):
        server.answer = lambda path, number, status=status: Answer(status, b"no")  # type: ignore[misc]
        with pytest.raises(error, match=rf"d/a\.tar'.*{status}") as caught:
            Storage(QUICK).read_bytes(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("status", "requests"), [(400, 1), (405, 1), (410, 1), (429, 3), (500, 3), (504, 3)])
def test_only_what_may_pass_is_asked_again(server: Notes, status: int, requests: int) -> None:
    server.answer = lambda path, number: Answer(status, b"why not")
    with pytest.raises(StorageError, match=f"{status}.*why not"):
        Storage(QUICK).read_bytes(f"{server.url}/a.tar")
    assert len(server.requests) == requests


def _keys(monkeypatch: pytest.MonkeyPatch, server: Notes) -> None:
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize("status", [400, 301])
def test_a_bucket_of_another_region_is_found_there(server: Notes, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """S3 names the region in the body of a 400, and in the header of a 301 that our client does not show."""
    _keys(monkeypatch, server)
    said = "<Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region>" if status == 400 else ""

    def answer(path: str, number: int) -> Answer:
        at_home = "/eu-west-3/s3" in server.requests[-1]["authorization"]
        return Answer() if at_home else Answer(status, f"<Error>{said}</Error>".encode())

    server.answer = answer
    assert Storage(QUICK).read_bytes("s3://b/a.tar") == DATA
    server.answer = lambda path, number: Answer(status, f"<Error>{said}</Error>".encode())
    with pytest.raises(StorageError, match="400 Auth" if status == 400 else "another region.*AWS_REGION"):
        Storage(QUICK).read_bytes("s3://b/other.tar")


def test_temporary_keys_are_sent_with_their_token(server: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    _keys(monkeypatch, server)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session")
    assert Storage(QUICK).read_bytes("s3://b/a.tar") == DATA
    assert {request["x-amz-security-token"] for request in server.requests} == {"session"}


def test_a_server_that_is_not_there_is_an_error_after_all_attempts() -> None:
    storage = Storage(QUICK)
    with pytest.raises(StorageError, match="failed 3 times.*the connection was refused"):
        storage.read_bytes("http://127.0.0.1:1/a.tar")
    assert storage.counters["retries"] == 2


def test_an_encrypted_endpoint_is_not_replaced_by_a_plain_one(server: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect from https to http would send signed requests in the clear; plain http needs an http endpoint."""
    _keys(monkeypatch, server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("http:", "https:"))
    with pytest.raises(StorageError, match="failed 3 times"):
        Storage(QUICK).read_bytes("s3://b/a.tar")
    assert server.requests == []
