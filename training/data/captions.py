"""Reads the caption of a sample; where there are several, the choice is keyed by the sample's seed.

A text member, fields of the .json member (--json-text-key), or the list that a row of a JSON Lines file carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from training.data.image_file import UnusableSample
from training.data.lanes import mix
from training.data.tar_reader import RawSample

MAX_CAPTION_BYTES = 1 << 16
"""Longer captions are refused: a model reads the first 77 tokens or so, the rest would only cost time."""

_VISIBLE = re.compile("[^\\s\\x00-\\x1f\\x7f-\\xa0\\xad\\u200b-\\u200f\\u202a-\\u202e\\u2060-\\u206f\\ufeff]")
"""Anything but white space, control characters, byte order marks and marks of writing direction."""

CAPTION_LIST = "CAPTIONS"
"""The member that carries a row's several captions as a JSON list. No tar has it: extensions there are lower case."""

MAX_JSON_BYTES = 1 << 20
_FIELD_DRAW, _LIST_DRAW = 0xCA97101, 0xCA97102


class CaptionReader:
    """Finds and checks a raw sample's caption, as the flags --text-key, --json-text-key and its probabilities say."""

    def __init__(
        self, *, text_key: str, json_text_key: str | None, json_text_key_probs: Sequence[float] | None
    ) -> None:
        self.text_extensions = tuple(text_key.lower().split(";"))
        self.json_fields: tuple[str, ...] = ()
        self.json_probs: tuple[float, ...] | None = None
        if json_text_key is not None:
            self.json_fields, self.json_probs = parse_json_text_keys(json_text_key, json_text_key_probs)

    def __call__(self, raw: RawSample, *, seed: int) -> str:
        """The caption; the same (raw, seed) always gives the same.

        Raises:
            UnusableSample: with a reason of ``decode_caption`` or ``json_caption``, or ``no_caption``.
        """
        if CAPTION_LIST in raw.members:
            return listed_caption(raw.members[CAPTION_LIST], seed=seed)
        if self.json_fields:
            data = first_member(raw, ("json",), missing="no_caption")
            return json_caption(data, fields=self.json_fields, probs=self.json_probs, seed=seed)
        return decode_caption(first_member(raw, self.text_extensions, missing="no_caption"))


def first_member(raw: RawSample, extensions: Sequence[str], *, missing: str) -> bytes:
    """The data of the first of ``extensions`` that the sample has."""
    for extension in extensions:
        if extension in raw.members:
            return raw.members[extension]
    raise UnusableSample(missing)


def decode_caption(data: bytes) -> str:
    """A caption as text; an empty one is unusable (every empty caption would be a negative of every other)."""
    if len(data) > MAX_CAPTION_BYTES:
        raise UnusableSample("caption_too_long")
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UnusableSample("caption_not_utf8") from None
    if not _VISIBLE.search(caption):
        raise UnusableSample("empty_caption")
    return caption


def parse_json_text_keys(text: str, probs: Sequence[float] | None) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Checks ``--json-text-key`` ("a;b") and ``--json-text-key-probs``; missing probabilities at the end are 0.

    Raises:
        ValueError: no field, a field twice, or probabilities that are none.
    """
    fields = tuple(field.strip() for field in text.split(";") if field.strip())
    if not fields or len(set(fields)) < len(fields):
        raise ValueError(f"--json-text-key {text!r}: give the names of one or more different fields, ';' between them.")
    if probs is None:
        return fields, None
    if len(probs) > len(fields):
        raise ValueError(f"--json-text-key-probs has {len(probs)} numbers for the {len(fields)} fields of {text!r}.")
    if not all(0 <= prob < float("inf") for prob in probs) or sum(probs) <= 0:
        raise ValueError(f"--json-text-key-probs {list(probs)}: give numbers, none negative, not all 0.")
    return fields, (*probs, *[0.0] * (len(fields) - len(probs)))


def json_caption(data: bytes, *, fields: Sequence[str], probs: Sequence[float] | None, seed: int) -> str:
    """The caption in one of the fields of a JSON object, by the rules of OpenCLIP's ``--json-text-key``.

    Without ``probs``: the first field that holds text. With them: a draw among the fields that hold text, their
    probabilities taken relative to each other; fields of probability 0 serve, in order, where no other holds text. A
    field may hold a list: one of its texts is drawn. White space around the caption is dropped.

    Raises:
        UnusableSample: ``json_broken``, ``json_too_large``, ``no_caption`` (no such field), ``empty_caption`` (no text
            in any), or a reason of ``checked_caption``.
    """
    content = _parse_object(data)
    texts = [_texts(content.get(field)) for field in fields]
    usable = [index for index, choices in enumerate(texts) if choices]
    if not usable:
        raise UnusableSample("empty_caption" if any(field in content for field in fields) else "no_caption")
    index = _draw_field(usable, probs, seed)
    return checked_caption(_draw(texts[index], seed))


def listed_caption(data: bytes, *, seed: int) -> str:
    """One of the captions that a ``CAPTION_LIST`` member carries.

    Raises:
        UnusableSample: ``empty_caption`` if none holds text, or a reason of ``checked_caption``.
    """
    choices = _texts(json.loads(data))
    if not choices:
        raise UnusableSample("empty_caption")
    return checked_caption(_draw(choices, seed))


def checked_caption(caption: str) -> str:
    """The caption, if it can be tokenized at a bounded cost.

    Raises:
        UnusableSample: ``caption_too_long``, or ``caption_not_utf8`` (JSON can spell half of a surrogate pair).
    """
    try:
        size = len(caption.encode())
    except UnicodeEncodeError:
        raise UnusableSample("caption_not_utf8") from None
    if size > MAX_CAPTION_BYTES:
        raise UnusableSample("caption_too_long")
    return caption


def _parse_object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_JSON_BYTES:
        raise UnusableSample("json_too_large")
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UnusableSample("json_broken") from None
    if not isinstance(content, dict):
        raise UnusableSample("json_broken")
    return content


def _texts(value: object) -> list[str]:
    """The texts in a field that are not blank; none in numbers, objects and null."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if isinstance(item, str) and _VISIBLE.search(text := item.strip())]


def _draw_field(usable: Sequence[int], probs: Sequence[float] | None, seed: int) -> int:
    weights = [0.0 if probs is None else probs[index] for index in usable]
    point = mix(seed, _FIELD_DRAW) / 2**64 * sum(weights)
    chosen = usable[0]  # stays the choice where no field has weight
    for index, weight in zip(usable, weights, strict=True):
        if weight:
            chosen = index
            point -= weight
            if point < 0:
                break
    return chosen


def _draw(choices: Sequence[str], seed: int) -> str:
    return choices[mix(seed, _LIST_DRAW) % len(choices)]
