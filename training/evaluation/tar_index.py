"""Finds where the images of a tar lie and reads what stands beside them, so that any rank can read any image later."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image

from training.data.decode import UnusableSample, decode_caption
from training.data.tar_reader import TarError, read_members, split_name

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Member(NamedTuple):
    """A file in a tar: its data, and where they begin."""

    offset: int
    data: bytes


class TarRecord(NamedTuple):
    """One sample of a tar: its image by position, its label or captions by value."""

    path: str
    key: str
    offset: int
    size: int
    label: int
    captions: tuple[str, ...]


class Unfit(ValueError):
    """A sample that an evaluation set may not hold; the message names shard and key."""


RecordReader = Callable[[str, str, dict[str, Member]], TarRecord]
"""(path, key, members by lower-case extension) -> record; raises Unfit."""


class TarIndex(NamedTuple):
    """The samples of one tar, and what was wrong with those that are not among them."""

    records: list[TarRecord]
    unfit: list[str]


def index_tar(path: str, read_record: RecordReader) -> TarIndex:
    """Reads the whole tar once, in order, which also proves that it is complete.

    Raises:
        ValueError: the tar is damaged.
    """
    records: list[TarRecord] = []
    unfit: list[str] = []
    try:
        for key, members in tar_samples(path):
            try:
                records.append(read_record(path, key, members))
            except Unfit as fault:
                unfit.append(str(fault))
    except TarError as error:
        raise ValueError(f"Shard {path!r} is damaged ({error}): write it again.") from error
    return TarIndex(records, unfit)


def tar_samples(path: str) -> Iterator[tuple[str, dict[str, Member]]]:
    """Consecutive members that share a key, as in ``training.data.tar_reader.read_samples``, with their offsets."""
    key: str | None = None
    members: dict[str, Member] = {}
    with open(path, "rb") as stream:
        for member in read_members(stream):
            member_key, extension = split_name(member.name)
            base = os.path.basename(member.name)
            if not extension or (base.startswith("__") and base.endswith("__")):
                continue
            if member_key != key or extension in members:
                if members:
                    yield str(key), members
                key, members = member_key, {}
            members[extension] = Member(member.data_offset, member.data)
    if members:
        yield str(key), members


class LabelledReader:
    """Records of a classification set: an image and a ``.cls`` with the number of its class."""

    def __init__(self, *, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, path: str, key: str, members: dict[str, Member]) -> TarRecord:
        image = image_member(path, key, members, IMAGE_EXTENSIONS)
        if "cls" not in members:
            raise Unfit(f"Shard {path!r}, sample {key!r} has no .cls member (its members: {_names(members)}).")
        text = members["cls"].data.decode("ascii", "replace").strip()
        if not text.isdigit():
            raise Unfit(f"Shard {path!r}, sample {key!r}: label {text[:40]!r} is not a class number.")
        label = int(text)
        if label >= self.num_classes:
            raise Unfit(
                f"Shard {path!r}, sample {key!r}: label {label} is out of range for the {self.num_classes} classes in "
                "classnames.txt (0 is the first)."
            )
        return TarRecord(path, key, image.offset, len(image.data), label, ())


class CaptionedReader:
    """Records of images with captions: one caption per line, or the whole text as one (``single``)."""

    def __init__(
        self,
        *,
        single: bool,
        image_extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
        text_extensions: tuple[str, ...] = ("txt",),
    ) -> None:
        self.single = single
        self.image_extensions = image_extensions
        self.text_extensions = text_extensions

    def __call__(self, path: str, key: str, members: dict[str, Member]) -> TarRecord:
        image = image_member(path, key, members, self.image_extensions)
        data = next((members[name].data for name in self.text_extensions if name in members), None)
        if data is None:
            wanted = " or ".join(f".{name}" for name in self.text_extensions)
            raise Unfit(f"Shard {path!r}, sample {key!r} has no {wanted} member (its members: {_names(members)}).")
        captions = parse_captions(data, single=self.single, where=f"Shard {path!r}, sample {key!r}")
        return TarRecord(path, key, image.offset, len(image.data), -1, captions)


def image_member(path: str, key: str, members: dict[str, Member], extensions: tuple[str, ...]) -> Member:
    """The sample's image, if its first bytes are an image's: what is broken later on shows when it is decoded."""
    for extension in extensions:
        if extension in members:
            if not _has_image_header(members[extension].data):
                raise Unfit(f"Shard {path!r}, sample {key!r}: its .{extension} member is no image.")
            return members[extension]
    raise Unfit(f"Shard {path!r}, sample {key!r} has no image member (its members: {_names(members)}).")


def _has_image_header(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)):
            return True
    except Exception:  # Pillow's plugins raise a dozen types for damaged files, SyntaxError among them
        return False


def parse_captions(data: bytes, *, single: bool, where: str) -> tuple[str, ...]:
    """The captions in a text member; blank lines are none.

    Raises:
        Unfit: no caption at all, or bytes that are no text.
    """
    try:
        text = decode_caption(data)
    except UnusableSample as fault:
        raise Unfit(f"{where}: {fault.reason.replace('_', ' ')}.") from fault
    return (text,) if single else tuple(line.strip() for line in text.splitlines() if line.strip())


def _names(members: dict[str, Member]) -> str:
    return ", ".join(f".{name}" for name in members)
