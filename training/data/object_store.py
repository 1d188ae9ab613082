"""Asks S3 and web servers for ranges of objects, one client for each bucket or server and process.

The client is obstore: connections are reused, and bytes arrive outside of Python's lock. Its own retries are off: ours
(``object_stream.py``) are counted, logged, and go on at the byte reached.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, S3Store

from training.data.aws_settings import S3Settings, find_settings, no_credentials, profile_credentials
from training.data.storage_errors import AccessDenied, ShardChanged, ShardMissing, StorageError, Transient

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, S3Config

    from training.data.storage import StorageOptions

_PIECE_BYTES = 256 << 10
"""Smallest piece handed over: larger ones cost less Python, smaller ones come sooner."""
_SHOWN_ERROR = 300
_NO_LIMIT_S = 30 * 86400.0
_STATUS = re.compile(r"status code: (\d{3})[^:]*(?:: )?(.*)", re.DOTALL)
_DENIED_CODES = re.compile(
    "<Code>(ExpiredToken|ExpiredTokenException|TokenRefreshRequired|InvalidToken|InvalidAccessKeyId|AccessDenied|"
    "SignatureDoesNotMatch|RequestTimeTooSkewed|AuthorizationHeaderMalformed)</Code>"
)
_ASKED_AGAIN = (408, 425, 429)
_REGION = re.compile(r"<Region>([a-z0-9-]+)</Region>")
_REDIRECT = "redirect without LOCATION"
_ANY_REGION = "https://s3.amazonaws.com"
_REGION_TIMEOUT_S = 10.0
_IDENTITY_SERVICE = re.compile(
    r"Error performing \w+ https?://(169\.254\.|\[fd00:ec2|sts\.)|External AWS credential provider"
)
_CAUSES = {
    "IncompleteBody": "the body ended early",
    "ConnectionReset": "the connection was reset",
    "ConnectionRefused": "the connection was refused",
    "TimedOut": "no answer in time",
    "dns error": "the server's name is not known",
    "certificate": "the server's certificate is not trusted",
}

_runtime_pid: int | None = None
_served: set[tuple[str, S3Settings | None]] = set()
"""Whose credentials have worked in this process."""


class RangesUnsupported(Exception):
    """The server sends whole objects only."""


class OutOfRange(Exception):
    """The object ends before the first byte asked for."""


class Version(NamedTuple):
    """What tells an object from another one under the same name."""

    size: int
    etag: str | None


class Response(NamedTuple):
    """The answer to one request, its body still to come."""

    version: Version
    pieces: Iterator[bytes]


class RemoteObject:
    """One object in a bucket or on a web server."""

    def __init__(
        self, url: str, *, options: StorageOptions, settings: tuple[tuple[str, str], ...] = (), whole: bool = False
    ) -> None:
        """
        Args:
            settings: endpoint, region, profile, anonymous; what is not there comes from the environment.
            whole: to be read in one request, which lasts as long as whoever uses the bytes takes.
        """
        self._timeouts = _timeouts(options, whole=whole)
        parts = urlsplit(url)
        self._settings: S3Settings | None = None
        self._bucket = ""
        self.name = url
        """For messages: the URL without its query, which may hold a signature."""
        if parts.scheme in ("http", "https"):
            self.name = url.partition("?")[0]
            self._path = unquote(parts.path).lstrip("/")
            self._store = _http_store(os.getpid(), f"{parts.scheme}://{parts.netloc}/?{parts.query}", self._timeouts)
        else:
            bucket, _, self._path = url.partition("://")[2].partition("/")
            self._bucket = bucket
            self._connect(find_settings(dict(settings)))

    def get(self, start: int, end: int | None, *, expected: Version | None = None) -> Response:
        """Asks for bytes [start, end), or for all where ``end`` is None.

        Raises, here or while the pieces come:
            ShardMissing, AccessDenied, ShardChanged, StorageError: asking again is of no use. Transient: it may be.
            RangesUnsupported, OutOfRange.
        """
        try:
            return self._get(start, end, expected)
        except (BaseError, OSError, ValueError) as error:
            if self._move_to_region_in(error):
                return self.get(start, end, expected=expected)
            raise self._translate(error, start) from error

    def head(self) -> Version:
        """Size and ETag. Raises as ``get``."""
        try:
            meta = obstore.head(self._store, self._path)
        except (BaseError, OSError, ValueError) as error:
            raise self._translate(error, 0) from error
        return Version(meta["size"], meta["e_tag"])

    def _get(self, start: int, end: int | None, expected: Version | None) -> Response:
        _check_process()
        options: GetOptions = {} if end is None else {"range": (start, end)}
        if expected is not None and expected.etag is not None and not expected.etag.startswith("W/"):
            options["if_match"] = expected.etag  # a weak one never matches, by the standard
        result = obstore.get(self._store, self._path, options=options)
        _served.add((self._bucket, self._settings))
        version = Version(result.meta["size"], result.meta["e_tag"])
        if expected is not None and version != expected:
            raise self._changed(
                f"{expected.size} bytes, ETag {expected.etag}; now {version.size} bytes, {version.etag}"
            )
        return Response(version, self._pieces(result.stream(min_chunk_size=_PIECE_BYTES), start))

    def _pieces(self, stream: Any, start: int) -> Iterator[bytes]:
        try:
            for piece in stream:
                start += len(piece)
                yield bytes(piece)
        except (BaseError, OSError) as error:
            raise self._translate(error, start) from error

    def _connect(self, settings: S3Settings) -> None:
        self._settings = settings
        self._store = _s3_store(os.getpid(), self._bucket, settings, self._timeouts)

    def _move_to_region_in(self, error: Exception) -> bool:
        """Whether the bucket is in another region than we asked in; the command goes there by itself, so we do."""
        text = str(error)
        found = _REGION.search(text)
        if self._settings is None or (found is None and _REDIRECT not in text):
            return False
        region = found[1] if found is not None else _bucket_region(self._bucket, self._settings)
        if region is None or region == self._settings.region:
            return False
        self._connect(self._settings._replace(region=region))
        return True

    def _translate(self, error: Exception, at: int) -> Exception:
        """What the client's error means to a reader."""
        text = str(error)
        found = _STATUS.search(text)
        status = int(found[1]) if found else None
        said = _said(text)
        if isinstance(error, FileNotFoundError):
            return ShardMissing(f"{self.name!r} does not exist ({said}): correct its name.")
        if isinstance(error, PreconditionError):
            return self._changed(f"at byte {at} the server said: {said}")
        if _IDENTITY_SERVICE.search(text):
            return self._translate_login(error, status, said)
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _DENIED_CODES.search(text):
            return AccessDenied(f"{self.name!r} may not be read, the server says: {said}. {self._remedy()}")
        if isinstance(error, NotSupportedError):
            return RangesUnsupported(said)
        if _REDIRECT in text:
            return StorageError(f"{self.name!r} is in another region, and S3 does not say which: set AWS_REGION.")
        if status == 416:
            return OutOfRange(said)
        refused = status is not None and status < 500 and status not in _ASKED_AGAIN and "RequestTimeout" not in text
        if refused or isinstance(error, ValueError):
            return StorageError(f"{self.name!r} cannot be read, and asking again is of no use: {said}.")
        return Transient(said)

    def _translate_login(self, error: Exception, status: int | None, said: str) -> Exception:
        """No answer about credentials: fatal, unless they were there before or the service that gives them is busy."""
        busy = status is not None and (status >= 500 or status in _ASKED_AGAIN)
        if busy or (self._bucket, self._settings) in _served:
            return Transient(f"no credentials: {said}")
        if isinstance(error, UnauthenticatedError):
            return AccessDenied(f"{self.name!r} may not be read, the credentials of this machine are not: {said}.")
        return AccessDenied(f"{self.name!r} may not be read. {no_credentials(said)}")

    def _remedy(self) -> str:
        if self._settings is None:
            return "Check the URL and what the server asks for."
        return (
            "Check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, the machine's role) and whether they have expired, "
            "the bucket's policy, and the name: where listing is not allowed, S3 says the same of an object that is "
            "not there."
        )

    def _changed(self, how: str) -> ShardChanged:
        return ShardChanged(f"{self.name!r} changed while it was read ({how}): do not overwrite shards during a run.")


def _check_process() -> None:
    """obstore's threads do not survive a fork, and a request in the child would wait for ever."""
    global _runtime_pid
    pid = os.getpid()
    if _runtime_pid is None:
        _runtime_pid = pid
    if _runtime_pid != pid:
        raise RuntimeError(
            f"Process {pid} was forked from process {_runtime_pid} after that had read remote shards, so it cannot "
            "read any itself: fork from a process that has not, or start it by spawn or forkserver."
        )


Timeouts = tuple[float, float, float]


def _timeouts(options: StorageOptions, *, whole: bool) -> Timeouts:
    """Connect, read, whole request. The last is the backstop of the low-speed limit, which sees whole pieces only."""
    whole_s = options.low_speed_s + options.chunk_bytes / max(1, options.low_speed_bytes_per_s)
    return options.connect_timeout_s, options.read_timeout_s, _NO_LIMIT_S if whole else whole_s


# By process, because a client's connections are not shared; by everything else that makes two clients different.
@lru_cache(maxsize=256)
def _http_store(pid: int, origin: str, timeouts: Timeouts) -> Any:
    return HTTPStore.from_url(origin.removesuffix("?"), **_client(timeouts, allow_http=origin.startswith("http:")))


@lru_cache(maxsize=256)
def _s3_store(pid: int, bucket: str, settings: S3Settings, timeouts: Timeouts) -> Any:
    config: S3Config = {"region": settings.region}
    if settings.endpoint is not None:
        config["aws_endpoint_url_s3"] = settings.endpoint
    if settings.anonymous:
        config["skip_signature"] = True
    provider: Callable[[], Any] | None = profile_credentials(settings.profile) if settings.profile is not None else None
    insecure = settings.endpoint is not None and settings.endpoint.startswith("http:")
    return S3Store(bucket, config=config, credential_provider=provider, **_client(timeouts, allow_http=insecure))


def _bucket_region(bucket: str, settings: S3Settings) -> str | None:
    """S3 tells anybody, but in a header that our client does not pass on."""
    request = Request(f"{settings.endpoint or _ANY_REGION}/{bucket}", method="HEAD")
    try:
        with urlopen(request, timeout=_REGION_TIMEOUT_S) as answer:
            headers = answer.headers
    except HTTPError as error:
        headers = error.headers
    except OSError:
        return None
    region = headers.get("x-amz-bucket-region")
    return str(region) if region else None


def _client(timeouts: Timeouts, *, allow_http: bool) -> dict[str, Any]:
    connect_s, read_s, request_s = (timedelta(seconds=seconds) for seconds in timeouts)
    options: ClientConfig = {
        "connect_timeout": connect_s,
        "read_timeout": read_s,
        "timeout": request_s,
        "allow_http": allow_http,
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        try:
            options["root_certificate"] = Path(bundle).read_bytes()
        except OSError as error:
            raise StorageError(f"AWS_CA_BUNDLE {bundle!r} cannot be read ({error.strerror}): correct it.") from error
    return {"client_options": options, "retry_config": {"max_retries": 0, "retry_timeout": timedelta(0)}}


def _said(text: str) -> str:
    """The server's own words, or the reason why there are none."""
    summary, _, details = text.partition("\n\nDebug source:")
    found = _STATUS.search(summary)
    if found is None:
        reason = next((words for needle, words in _CAUSES.items() if needle in details), None)
        return reason or _clip(summary)
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", found[2]) for tag in ("Code", "Message"))
    words = [part[1] for part in (code, message) if part is not None]
    return f"{found[1]} {': '.join(words)}" if words else _clip(f"{found[1]} {found[2]}")


def _clip(text: str) -> str:
    text = re.sub(r"\?\S+", "?...", " ".join(text.split()))
    return f"{text[:_SHOWN_ERROR]}..." if len(text) > _SHOWN_ERROR else text
