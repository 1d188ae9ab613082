"""Reads objects from S3 and web servers in ranges, the next one asked for while the last one is used.

The client is obstore: connections are reused, ranges run beside each other outside of Python's lock. Retries are ours,
so that they are counted, and so that they go on at the byte reached.
"""

from __future__ import annotations

import configparser
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import HTTPStore, S3Store

from training.data.storage_errors import AccessDenied, Patience, ShardChanged, ShardMissing

if TYPE_CHECKING:
    from training.data.storage import StorageOptions

_STREAM_BYTES = 256 << 10
_THREADS = 16
_SHOWN_ERROR = 300
_METADATA_SERVICE = "169.254."
_DENIED = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "TokenRefreshRequired",
    "AccessDenied",
    "403 Forbidden",
    "401 Unauthorized",
)


class ObjectStream:
    """An object as a stream. Memory: the chunks in flight."""

    def __init__(
        self, url: str, offset: int, *, options: StorageOptions, counters: Counter[str], settings: dict[str, str]
    ) -> None:
        """
        Args:
            settings: endpoint, region, profile, anonymous; what is not there comes from the environment.
        """
        self._url = url
        self._options = options
        self._counters = counters
        self._store, self._path = _locate(url, options, settings)
        self._etag: str | None = None
        self.size: int | None = None
        self.offset = offset
        self._chunk = memoryview(b"")
        self._ahead: deque[Future[bytes]] = deque()
        self._asked = offset  # the first byte that nothing in flight covers

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the object."""
        if size <= len(self._chunk):
            return self._take(size)
        parts = []
        while size and (len(self._chunk) or self._next_chunk()):
            parts.append(self._take(min(size, len(self._chunk))))
            size -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int, /) -> None:
        """Drops what is in flight; what lies beyond is not fetched."""
        target = self.offset + size
        while self.offset < target:
            if len(self._chunk):
                self._take(min(target - self.offset, len(self._chunk)))
            elif target < self._asked:
                self._next_chunk()
            else:
                self._drop()
                self.offset = self._asked = target

    def close(self) -> None:
        """Drops what is in flight."""
        self._drop()
        self._chunk = memoryview(b"")

    def _take(self, size: int) -> bytes:
        data = bytes(self._chunk[:size])
        self._chunk = self._chunk[size:]
        self.offset += size
        return data

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _next_chunk(self) -> bool:
        """Waits for the next chunk and asks for more; False at the end of the object."""
        if self.size is None:
            self._chunk = memoryview(self._fetch(self.offset, self.offset + self._options.chunk_bytes))
            self._asked = self.offset + len(self._chunk)
        elif self._ahead:
            self._chunk = memoryview(self._ahead.popleft().result())
        elif self._asked < self.size:
            self._ask()
            self._chunk = memoryview(self._ahead.popleft().result())
        while len(self._ahead) < self._options.chunks_ahead and self.size is not None and self._asked < self.size:
            self._ask()
        return len(self._chunk) > 0

    def _ask(self) -> None:
        assert self.size is not None
        end = min(self.size, self._asked + self._options.chunk_bytes)
        self._ahead.append(_executor(os.getpid()).submit(self._fetch, self._asked, end))
        self._asked = end

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes [start, end), or up to the end of the object; whatever breaks on the way is asked for again."""
        parts: list[bytes] = []
        patience = Patience(self._options, counters=self._counters)
        while start < end and (self.size is None or start < self.size):
            try:
                for part in self._request(start, end):
                    parts.append(part)
                    start += len(part)
                    self._counters["bytes_read"] += len(part)
                    patience.progress()
                if start < end and start != self.size:
                    raise ConnectionError(f"the server sent too little, up to byte {start}")
            except FileNotFoundError:
                raise ShardMissing(f"{self._url!r} does not exist (404): correct --train-data.") from None
            except PreconditionError:
                raise ShardChanged(
                    f"{self._url!r} changed while it was read (its ETag is not {self._etag} any more, byte {start}): "
                    "shards must not be overwritten during a run."
                ) from None
            except (BaseError, OSError) as error:
                self._check_denied(error)
                if self._is_empty(error):
                    break
                patience.failed(f"Reading {self._url!r} at byte {start}", _short(error))
        return b"".join(parts)

    def _request(self, start: int, end: int) -> Iterator[bytes]:
        self._counters["requests"] += 1
        options: dict[str, Any] = {"range": (start, end)}
        if self._etag is not None and not self._etag.startswith("W/"):  # weak ones never match, by the standard
            options["if_match"] = self._etag
        result = obstore.get(self._store, self._path, options=options)
        size, etag = result.meta["size"], result.meta["e_tag"]
        if self.size is not None and (size, etag) != (self.size, self._etag):
            raise ShardChanged(
                f"{self._url!r} changed while it was read ({self.size} bytes, ETag {self._etag}, then {size} bytes, "
                f"{etag}): shards must not be overwritten during a run."
            )
        self.size, self._etag = size, etag
        for part in result.stream(min_chunk_size=_STREAM_BYTES):
            yield bytes(part)

    def _check_denied(self, error: Exception) -> None:
        text = str(error)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError) or any(
            code in text for code in _DENIED
        ):
            raise AccessDenied(
                f"{self._url!r} may not be read: {_short(error)} Check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, "
                "the node's role), their expiry and the bucket's policy; with --resume latest the run goes on."
            ) from error
        if self.size is None and _METADATA_SERVICE in text:
            raise AccessDenied(
                f"No credentials for {self._url!r}: neither the environment nor ~/.aws has any, and this machine has no "
                "role. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data."
            ) from error

    def _is_empty(self, error: Exception) -> bool:
        """An empty object has no first range: the server answers 416."""
        if "416" not in str(error) and "out of range" not in str(error).lower():
            return False
        meta = obstore.head(self._store, self._path)
        self.size, self._etag = meta["size"], meta["e_tag"]
        return self.size <= self.offset


@lru_cache(maxsize=1)
def _executor(pid: int) -> ThreadPoolExecutor:
    """Threads that wait for ranges; of this process, as none survives a fork."""
    return ThreadPoolExecutor(_THREADS, f"ranges-{pid}")


def _locate(url: str, options: StorageOptions, settings: dict[str, str]) -> tuple[Any, str]:
    """(store, path in it) of a URL."""
    parts = urlsplit(url)
    timeouts = (options.connect_timeout_s, options.read_timeout_s, options.request_timeout_s)
    if parts.scheme in ("http", "https"):
        make: Callable[..., Any] = _http_store
        return make(os.getpid(), f"{parts.scheme}://{parts.netloc}", timeouts), parts.path.lstrip("/")
    return _s3_store(os.getpid(), parts.netloc, timeouts, tuple(sorted(settings.items()))), parts.path.lstrip("/")


def _client_options(timeouts: tuple[float, float, float]) -> dict[str, Any]:
    connect_s, read_s, request_s = (timedelta(seconds=seconds) for seconds in timeouts)
    return {"connect_timeout": connect_s, "read_timeout": read_s, "timeout": request_s, "allow_http": True}


# One client for each bucket or server and process: it keeps connections open, and its threads do not survive a fork.
@lru_cache(maxsize=256)
def _http_store(pid: int, origin: str, timeouts: tuple[float, float, float]) -> Any:
    return HTTPStore(origin, client_options=_client_options(timeouts), retry_config={"max_retries": 0})


@lru_cache(maxsize=256)
def _s3_store(
    pid: int, bucket: str, timeouts: tuple[float, float, float], settings: tuple[tuple[str, str], ...]
) -> Any:
    given = dict(settings)
    config: dict[str, Any] = _profile_settings(given.get("profile"))
    endpoint = given.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        config["endpoint"] = endpoint
    region = given.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config["region"] = region or config.get("region") or "us-east-1"
    if given.get("anonymous"):
        config["skip_signature"] = True
    return S3Store(bucket, config=config, client_options=_client_options(timeouts), retry_config={"max_retries": 0})


def _profile_settings(profile: str | None) -> dict[str, Any]:
    """What ~/.aws says, where the environment has no keys of its own; roles of the machine are found by the client."""
    if profile is None and "AWS_ACCESS_KEY_ID" in os.environ:
        return {}
    name = profile or os.environ.get("AWS_PROFILE") or "default"
    home = Path.home() / ".aws"
    credentials = _section(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials", name)
    general = _section(os.environ.get("AWS_CONFIG_FILE") or home / "config", f"profile {name}", name)
    merged = general | credentials
    keys = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region")
    found = {key: merged[key] for key in keys if key in merged}
    if "aws_access_key_id" not in found and {"sso_session", "sso_start_url", "role_arn", "credential_process"} & set(merged):
        raise AccessDenied(
            f"AWS profile {name!r} logs in by SSO, a role or a process, which needs the aws command: run "
            "`eval $(aws configure export-credentials --format env)` first, or pass --s3-native off."
        )
    if profile is not None and not merged:
        raise AccessDenied(f"There is no AWS profile {name!r} in ~/.aws: correct --profile in the command.")
    return found


def _section(path: str | Path, *names: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    parser.read(path)
    return next((dict(parser[name]) for name in names if parser.has_section(name)), {})


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_SHOWN_ERROR]}{'...' if len(text) > _SHOWN_ERROR else ''}"
