"""Recognises ``aws s3 cp s3://BUCKET/KEY -``, so that the bytes can be read without starting the command."""

from __future__ import annotations

import shlex
from typing import NamedTuple

_SWITCHES = frozenset({"--quiet", "--no-progress", "--only-show-errors"})
_VALUE_FLAGS = {"--endpoint-url": "endpoint", "--region": "region", "--profile": "profile"}
_IGNORED_VALUE_FLAGS = frozenset({"--expected-size"})
_SHELL = frozenset("|&;<>$`(){}[]*?#~\n\\")
"""Whatever the shell would act on: such a command is run, not read."""


class S3Copy(NamedTuple):
    """What the command reads."""

    url: str
    settings: tuple[tuple[str, str], ...]
    """endpoint, region, profile, anonymous: as given on its line, sorted."""


def parse_s3_copy(command: str) -> S3Copy | None:
    """The object that a command writes to its output; None for any other command, which must be run as it is."""
    if _SHELL & set(command):
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if not words or words[0].rpartition("/")[2] != "aws":
        return None
    settings: dict[str, str] = {}
    places: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _VALUE_FLAGS or name in _IGNORED_VALUE_FLAGS:
            value = value if equals else next(rest, "")
            if not value or value.startswith("-"):
                return None
            if name in _VALUE_FLAGS:
                settings[_VALUE_FLAGS[name]] = value
        elif word == "--no-sign-request":
            settings["anonymous"] = "true"
        elif word.startswith("-") and word != "-":
            if word not in _SWITCHES:
                return None
        else:
            places.append(word)
    if len(places) != 4 or places[:2] != ["s3", "cp"] or not places[2].startswith("s3://") or places[3] != "-":
        return None
    bucket, _, key = places[2].removeprefix("s3://").partition("/")
    # Access point names and keys with empty or dotted parts: the command can, our client cannot.
    if not bucket or ":" in bucket or not all(part not in ("", ".", "..") for part in key.split("/")):
        return None
    return S3Copy(places[2], tuple(sorted(settings.items())))
