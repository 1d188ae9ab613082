"""Tells shards that were moved from other shards: digests with and without the directories they lie in. Pure."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

from training.data.shards import ShardList, storage_location

_SHORT = 16
"""Hexadecimal digits of a digest that is only compared with those of the same run."""


class SourceDigests(NamedTuple):
    """What the sources of a stream are, as ``StreamIdentity`` has it."""

    sources: str
    names: str = ""
    source_digests: tuple[str, ...] = ()


def digest_sources(shards: ShardList, *, sources: str, weights: str) -> SourceDigests:
    """Digests of a list of shards; ``names`` is the same wherever its sources lie.

    Args:
        sources: digest of all that the stream depends on, places included.
        weights: anything beside the shards' names that the stream depends on.
    """
    urls_of = [shards.part(source).urls for source in shards.sources]
    names = [names_below_root(urls) for urls in urls_of]
    return SourceDigests(sources, _digest([names, weights]), tuple(_digest(urls)[:_SHORT] for urls in urls_of))


def names_below_root(urls: Sequence[str]) -> list[str]:
    """The shards' paths relative to the directory that all of them lie in.

    ``pipe:aws s3 cp s3://bucket/set/0.tar -`` has the name of ``/local/set/0.tar``, where only its URL is remote.
    """
    places = [storage_location(url) or url for url in urls]
    root = os.path.commonprefix([place[: place.rfind("/") + 1] for place in places])
    start = root.rfind("/") + 1
    return [place[start:] for place in places]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
