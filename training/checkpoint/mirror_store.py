"""Reads and writes the objects under one URL: S3 through our own client, anything else through fsspec.

What goes wrong is one of three things: an object is not there (``RemoteMissing``), the storage refuses and waiting does
not mend it (``RemoteRefused``), or asking again may help (``Transient``).
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import fsspec

from training.data.aws_settings import find_settings, profile_credentials
from training.data.storage_errors import AccessDenied, Patience, StorageCounters, StorageError, Transient

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

Result = TypeVar("Result")

S3_PREFIXES = ("s3://", "s3a://", "s3n://")
_SHOWN_ERROR = 300
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile("<Code>([^<]*)</Code>")
_DENIED = frozenset(
    {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AccessDenied", "SignatureDoesNotMatch", "NoSuchBucket"}
)
_ASKED_AGAIN = (408, 425, 429)
_PART_BYTES = 8 << 20
_MOST_PARTS = 9000
"""S3 takes 10,000 of one object."""
_PARTS_AT_ONCE = 4
_BLOCK_BYTES = 4 << 20
_WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "hf", "memory"})
"""Where an object appears when all of it is there; elsewhere it is written under another name and renamed."""
TEMPORARY_PREFIX = ".tmp-"
_VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")


class RemoteRefused(StorageError):
    """No permission, no credentials, no such bucket: asking again is of no use until somebody changes that."""


class RemoteMissing(StorageError):
    """There is no such object."""


@dataclass(frozen=True)
class RemoteOptions:
    """How patient we are with the storage."""

    attempts: int = 6
    """In a row, of one request or one file."""
    first_delay_s: float = 1.0
    """Before the second attempt, with jitter; doubles up to ``longest_delay_s``."""
    longest_delay_s: float = 30.0
    timeout_s: float = 60.0
    """Of one request, which moves 8 MiB at most."""


DEFAULT_OPTIONS = RemoteOptions()


class RemoteFile(NamedTuple):
    """What a listing says of an object."""

    size: int
    version: str | None
    """Changes with the object: its ETag, or its time where the storage has no ETags."""


class RemoteStore(Protocol):
    """Objects by their key, relative to a URL. An object exists whole or not at all, as far as the storage allows."""

    url: str

    def list(self, prefix: str = "", /) -> dict[str, RemoteFile]:
        """All objects under a prefix that ends at a slash."""

    def head(self, key: str, /) -> RemoteFile:
        """What a listing says of one object."""

    def read(self, key: str, /) -> bytes:
        """A small object."""

    def stream(self, key: str, start: int, /) -> Iterator[bytes]:
        """An object from a byte on."""

    def write(self, key: str, data: bytes, /) -> None:
        """Stores a small object."""

    def upload(self, key: str, path: Path, /) -> None:
        """Stores a file."""

    def delete(self, keys: Sequence[str], /) -> None:
        """Removes objects; those that are not there are no error."""

    def abort_unfinished(self) -> int:
        """Removes what earlier uploads that were killed have left out of sight; returns how many."""


def open_store(url: str, *, protocol: str | None = None, options: RemoteOptions = DEFAULT_OPTIONS) -> RemoteStore:
    """The storage under a URL.

    Args:
        protocol: ``s3`` for our own client, ``fsspec``, or None to choose by the URL.

    Raises:
        ValueError: not a URL that the protocol knows, or no credentials.
    """
    is_s3 = url.startswith(S3_PREFIXES)
    if protocol == "s3" and not is_s3:
        raise ValueError(
            f"{url!r} is no s3://BUCKET/PREFIX: correct --remote-sync, or pass --remote-sync-protocol fsspec."
        )
    try:
        return S3Objects(url, options=options) if is_s3 and protocol != "fsspec" else FsspecObjects(url)
    except AccessDenied as error:
        raise ValueError(f"{url!r} cannot be used: {error}") from error


def patiently(
    what: str,
    call: Callable[[], Result],
    *,
    options: RemoteOptions,
    counters: StorageCounters | None = None,
    wait: Callable[[float], object] = time.sleep,
) -> Result:
    """The result of a call that may fail for a while.

    Raises:
        StorageError: it failed too often in a row. RemoteMissing, RemoteRefused: at once.
    """
    patience = Patience(options, counters=StorageCounters() if counters is None else counters)
    while True:
        try:
            return call()
        except Transient as error:
            wait(patience.failed(what, error))


class S3Objects:
    """A prefix of a bucket."""

    def __init__(self, url: str, *, options: RemoteOptions) -> None:
        # Only here: reading and writing local checkpoints needs no network client.
        from obstore.store import S3Store

        self.url = url.rstrip("/")
        self._bucket, _, self._prefix = self.url.partition("://")[2].partition("/")
        if not self._bucket:
            raise ValueError(f"{url!r} names no bucket: write s3://BUCKET/PREFIX.")
        settings = find_settings({})
        self._settings = settings
        config: S3Config = {"region": settings.region}
        if settings.endpoint is not None:
            config["aws_endpoint_url_s3"] = settings.endpoint
        if settings.anonymous:
            config["skip_signature"] = True
        self._store: Any = S3Store(
            self._bucket,
            prefix=self._prefix or None,
            config=config,
            credential_provider=profile_credentials(settings.profile) if settings.profile is not None else None,
            client_options=_client_options(options, insecure=(settings.endpoint or "").startswith("http:")),
            # Ours are counted and logged; but a part of a large file is asked for again without the others.
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=options.timeout_s)},
        )

    def list(self, prefix: str = "", /) -> dict[str, RemoteFile]:
        import obstore

        with _s3_errors(f"{self.url}/{prefix}"):
            batches = obstore.list(self._store, prefix.rstrip("/") or None)
            return {meta["path"]: RemoteFile(meta["size"], meta["e_tag"]) for batch in batches for meta in batch}

    def head(self, key: str, /) -> RemoteFile:
        import obstore

        with _s3_errors(f"{self.url}/{key}"):
            meta = obstore.head(self._store, key)
            return RemoteFile(meta["size"], meta["e_tag"])

    def read(self, key: str, /) -> bytes:
        return b"".join(self.stream(key, 0))

    def stream(self, key: str, start: int, /) -> Iterator[bytes]:
        import obstore

        with _s3_errors(f"{self.url}/{key}"):
            result = obstore.get(self._store, key, options={"range": {"offset": start}} if start else {})
            for piece in result.stream(min_chunk_size=_BLOCK_BYTES):
                yield bytes(piece)

    def write(self, key: str, data: bytes, /) -> None:
        import obstore

        with _s3_errors(f"{self.url}/{key}"):
            obstore.put(self._store, key, data, max_concurrency=_PARTS_AT_ONCE)

    def upload(self, key: str, path: Path, /) -> None:
        import obstore

        part_bytes = max(_PART_BYTES, path.stat().st_size // _MOST_PARTS)
        with _s3_errors(f"{self.url}/{key}"):
            obstore.put(self._store, key, path, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE)

    def delete(self, keys: Sequence[str], /) -> None:
        import obstore

        if keys:
            with _s3_errors(self.url):
                obstore.delete(self._store, list(keys))

    def abort_unfinished(self) -> int:
        try:
            # Optional: our own client cannot list uploads. Without it, the bucket's lifecycle rule has to do it.
            import boto3  # type: ignore[import-untyped, unused-ignore]
        except ImportError:
            return 0
        session = boto3.Session(profile_name=self._settings.profile, region_name=self._settings.region)
        client = session.client("s3", endpoint_url=self._settings.endpoint)
        pages = client.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=f"{self._prefix}/" if self._prefix else ""
        )
        unfinished = [upload for page in pages for upload in page.get("Uploads", ())]
        for upload in unfinished:
            client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(unfinished)


class FsspecObjects:
    """A directory of any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{url!r} is no URL that fsspec can open here ({error}).") from error
        self._root = root.rstrip("/")
        names = self._files.protocol
        self._appear_whole = not _WHOLE_OBJECTS.isdisjoint((names,) if isinstance(names, str) else names)

    def list(self, prefix: str = "", /) -> dict[str, RemoteFile]:
        with self._errors(prefix):
            self._files.invalidate_cache()
            try:
                found: Mapping[str, Mapping[str, Any]] = self._files.find(self._path(prefix.rstrip("/")), detail=True)
            except FileNotFoundError:
                return {}
        return {path.removeprefix(self._root).lstrip("/"): _remote_file(info) for path, info in found.items()}

    def head(self, key: str, /) -> RemoteFile:
        with self._errors(key):
            self._files.invalidate_cache()
            return _remote_file(self._files.info(self._path(key)))

    def read(self, key: str, /) -> bytes:
        with self._errors(key):
            return bytes(self._files.cat_file(self._path(key)))

    def stream(self, key: str, start: int, /) -> Iterator[bytes]:
        with self._errors(key), self._files.open(self._path(key), "rb") as file:
            file.seek(start)
            while block := file.read(_BLOCK_BYTES):
                yield block

    def write(self, key: str, data: bytes, /) -> None:
        self._put(key, lambda path: self._files.pipe_file(path, data))

    def upload(self, key: str, path: Path, /) -> None:
        self._put(key, lambda remote: self._files.put_file(str(path), remote))

    def delete(self, keys: Sequence[str], /) -> None:
        for key in keys:
            with self._errors(key), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

    def abort_unfinished(self) -> int:
        leftovers = [key for key in self.list() if key.rpartition("/")[2].startswith(TEMPORARY_PREFIX)]
        self.delete(leftovers)
        return len(leftovers)

    def _put(self, key: str, put: Callable[[str], object]) -> None:
        final = self._path(key)
        with self._errors(key, writing=True):
            if self._appear_whole:
                put(final)
                return
            folder, _, name = final.rpartition("/")
            self._files.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
            try:
                put(temporary)
                self._files.mv(temporary, final)
            except BaseException:
                with contextlib.suppress(Exception):  # the first failure is the one to tell
                    self._files.rm_file(temporary)
                raise

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Every file system of fsspec raises errors of its own; these few are common."""
        name = f"{self.url}/{key}"
        try:
            yield
        except (StorageError, Transient):
            raise
        except FileNotFoundError as error:
            if writing:  # the bucket, or the root of a mount
                raise RemoteRefused(f"{name!r} cannot be written, there is no such place ({error}).") from error
            raise RemoteMissing(f"{name!r} does not exist.") from error
        except (PermissionError, NotADirectoryError, IsADirectoryError, ValueError, ImportError) as error:
            raise RemoteRefused(f"{name!r} cannot be used: {_clip(str(error))}.") from error
        except Exception as error:
            if "Credentials" in type(error).__name__:
                raise RemoteRefused(f"{name!r} cannot be used: {_clip(str(error))}.") from error
            raise Transient(_clip(f"{type(error).__name__}: {error}")) from error


@contextlib.contextmanager
def _s3_errors(name: str) -> Iterator[None]:
    from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        text = str(error)
        status, code = (found[1] if found else None for found in (_STATUS.search(text), _CODE.search(text)))
        said = f"{status or ''} {code or _clip(text.partition('Debug source:')[0])}".strip()
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or code in _DENIED
        if isinstance(error, FileNotFoundError) and not denied:
            raise RemoteMissing(f"{name!r} does not exist ({said}).") from error
        final = status is not None and int(status) < 500 and int(status) not in _ASKED_AGAIN
        if denied or (final and code != "RequestTimeout") or isinstance(error, NotSupportedError | ValueError):
            raise RemoteRefused(
                f"{name!r} cannot be used, the server says: {said}. Check the bucket's name and region, the "
                "credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, the machine's role) and that they may list, read, write "
                "and delete."
            ) from error
        raise Transient(said) from error


def _client_options(options: RemoteOptions, *, insecure: bool) -> ClientConfig:
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=10),
        "timeout": timedelta(seconds=options.timeout_s),
        "allow_http": insecure,
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        client["root_certificate"] = Path(bundle).read_bytes()
    return client


def _remote_file(info: Mapping[str, Any]) -> RemoteFile:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), None)
    return RemoteFile(int(info["size"]), version)


def _clip(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:_SHOWN_ERROR]}..." if len(text) > _SHOWN_ERROR else text
