"""Recognises ``aws s3 cp s3://BUCKET/KEY -``, so that the bytes can be read without starting the command."""

from __future__ import annotations

import shlex
from typing import NamedTuple

_IGNORED_SWITCHES = frozenset({"--quiet", "--no-progress", "--only-show-errors", "--no-guess-mime-type"})
_VALUE_FLAGS = {"--endpoint-url": "endpoint", "--region": "region", "--profile": "profile"}
_IGNORED_VALUE_FLAGS = frozenset({"--cli-read-timeout", "--cli-connect-timeout", "--expected-size"})
_SHELL = frozenset("|&;<>$`()*?#~\n")


class S3Copy(NamedTuple):
    """What the command reads."""

    url: str
    settings: dict[str, str]
    """endpoint, region, profile, anonymous: as given on its line."""


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
        if word == "--no-sign-request":
            settings["anonymous"] = "true"
        elif name in _VALUE_FLAGS:
            settings[_VALUE_FLAGS[name]] = value if equals else next(rest, "")
        elif name in _IGNORED_VALUE_FLAGS:
            if not equals:
                next(rest, "")
        elif word.startswith("--"):
            if word not in _IGNORED_SWITCHES:
                return None
        else:
            places.append(word)
    if len(places) != 4 or places[:2] != ["s3", "cp"] or not places[2].startswith("s3://") or places[3] != "-":
        return None
    return S3Copy(places[2], settings)
