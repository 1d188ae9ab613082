from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from torchvision.transforms.functional import pil_to_tensor

from tests.factories import jpeg_bytes
from training.data.captions import (
    CAPTION_LIST,
    MAX_JSON_BYTES,
    checked_caption,
    json_caption,
    listed_caption,
    parse_json_text_keys,
)
from training.data.decode import SampleDecoder
from training.data.image_file import UnusableSample
from training.data.tar_reader import RawSample

PAIR = json.dumps({"primary": "P", "secondary": "S", "width": 3}).encode()


def _caption(data: bytes | str, text_key: str, probs: list[float] | None = None, *, seed: int = 0) -> str:
    fields, weights = parse_json_text_keys(text_key, probs)
    return json_caption(data.encode() if isinstance(data, str) else data, fields=fields, probs=weights, seed=seed)


def _counts(data: bytes | str, text_key: str, probs: list[float] | None = None) -> Counter[str]:
    return Counter(_caption(data, text_key, probs, seed=seed) for seed in range(4000))


def test_without_probabilities_the_first_field_with_text_is_taken() -> None:
    data = '{"a": "   ", "b": " second ", "c": "third", "d": 4}'
    assert _caption(data, "a;b;c") == "second"
    assert _caption(data, "missing;c;b") == "third"
    assert _caption(data, "d;c") == "third"


def test_probabilities_are_how_often_each_field_is_taken() -> None:
    counts = _counts(PAIR, "primary;secondary", [0.7, 0.3])
    assert counts["P"] / 4000 == pytest.approx(0.7, abs=0.03)
    assert _counts(PAIR, "primary;secondary", [7, 3]) == counts


def test_a_field_of_probability_zero_serves_only_where_no_other_holds_text() -> None:
    assert set(_counts(PAIR, "primary;secondary", [1.0])) == {"P"}
    assert _caption('{"primary": " ", "secondary": "S"}', "primary;secondary", [1.0, 0.0]) == "S"


def test_probabilities_count_relative_to_those_of_the_fields_that_are_there() -> None:
    counts = _counts('{"a": "A", "c": "C"}', "a;b;c", [0.2, 0.6, 0.2])
    assert counts["A"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert counts["A"] + counts["C"] == 4000


def test_one_text_of_a_list_is_drawn_independently_of_the_field() -> None:
    counts = _counts('{"a": ["x", "", "y", 3], "b": ["v", "w"]}', "a;b", [0.5, 0.5])
    assert {text: count / 4000 for text, count in counts.items()} == pytest.approx(
        dict.fromkeys("xyvw", 0.25), abs=0.03
    )


def test_the_choice_depends_on_the_seed_alone() -> None:
    seeds = range(50)
    first = [_caption(PAIR, "primary;secondary", [0.5, 0.5], seed=seed) for seed in seeds]
    assert [_caption(PAIR, "primary;secondary", [0.5, 0.5], seed=seed) for seed in reversed(seeds)] == first[::-1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "json_broken"),
        (b"{", "json_broken"),
        (b'["a"]', "json_broken"),
        (b'{"a": "\xff"}', "json_broken"),
        (b"[" * 200_000, "json_broken"),
        (b'{"a": ' + b"9" * 5000 + b"}", "json_broken"),
        (b'{"b": "' + b"x" * MAX_JSON_BYTES + b'"}', "json_too_large"),
        (b'{"b": "x"}', "no_caption"),
        (b'{"a": ""}', "empty_caption"),
        (b'{"a": null}', "empty_caption"),
        (b'{"a": 7}', "empty_caption"),
        (b'{"a": []}', "empty_caption"),
        (b'{"a": {"b": "c"}}', "empty_caption"),
        (b'{"a": "\\ud800"}', "caption_not_utf8"),
        (b'{"a": "' + b"x" * 70_000 + b'"}', "caption_too_long"),
    ],
)
def test_what_is_no_caption_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableSample, match=f"^{reason}$"):
        _caption(data, "a")


def test_numbers_that_are_none_do_not_matter_in_other_fields() -> None:
    assert _caption('{"a": "x", "similarity": NaN}', "a") == "x"  # img2dataset writes them


def test_one_of_listed_captions_is_drawn() -> None:
    counts = Counter(listed_caption(b'["x", " ", "y"]', seed=seed) for seed in range(4000))
    assert set(counts) == {"x", "y"}
    assert counts["x"] / 4000 == pytest.approx(0.5, abs=0.03)
    with pytest.raises(UnusableSample, match="empty_caption"):
        listed_caption(b'["", " "]', seed=0)
    assert checked_caption("x") == "x"


@pytest.mark.parametrize(
    ("text_key", "probs", "message"),
    [
        (";", None, "--json-text-key ';': give the names"),
        ("a;a", None, "--json-text-key 'a;a': give the names"),
        ("a", [0.5, 0.5], "--json-text-key-probs has 2 numbers for the 1 fields of 'a'"),
        ("a;b", [0.5, -1.0], r"--json-text-key-probs \[0.5, -1.0\]: give numbers, none negative"),
        ("a;b", [0.0], r"--json-text-key-probs \[0.0\]: give numbers"),
        ("a", [float("nan")], r"--json-text-key-probs \[nan\]: give numbers"),
    ],
)
def test_fields_and_probabilities_are_checked(text_key: str, probs: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json_text_keys(text_key, probs)


def _decode(members: dict[str, bytes], **options: Any) -> list[str]:
    decoder = SampleDecoder(
        transform=pil_to_tensor, image_key="jpg", text_key="txt;caption", max_image_pixels=0, **options
    )
    raw = RawSample("k", {"jpg": jpeg_bytes(), **members})
    return [decoder.decode(raw, seed=seed).caption for seed in range(40)]


def test_the_decoder_reads_text_json_fields_and_lists() -> None:
    assert set(_decode({"caption": b"text", "json": PAIR})) == {"text"}
    assert set(_decode({"txt": b"text", "json": PAIR}, json_text_key="secondary")) == {"S"}
    options = {"json_text_key": "primary;secondary", "json_text_key_probs": (0.5, 0.5)}
    drawn = _decode({"json": PAIR}, **options)
    assert set(drawn) == {"P", "S"}
    assert drawn == _decode({"json": PAIR}, **options)
    assert set(_decode({CAPTION_LIST: b'["x", "y"]'})) == {"x", "y"}


def test_the_decoder_names_what_is_missing() -> None:
    with pytest.raises(UnusableSample, match="^no_caption$"):
        _decode({"json": PAIR})
    with pytest.raises(UnusableSample, match="^no_caption$"):
        _decode({"txt": b"text"}, json_text_key="primary")
