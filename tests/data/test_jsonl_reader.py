from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.factories import jpeg_bytes
from training.config import DataConfig
from training.data.captions import CAPTION_LIST
from training.data.jsonl_reader import JsonlTable

ROWS: list[dict[str, object]] = [
    {"image_path": "0.jpg", "caption": "one", "id": 4},
    {"image_path": "gone.jpg", "caption": ["two", "zwei \u00fc"]},
]


def _table(
    directory: Path, text: str, *, image: str = DataConfig.csv_img_key, caption: str = DataConfig.csv_caption_key
) -> JsonlTable:
    path = directory / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return JsonlTable(str(path), image_key=image, caption_key=caption, flag="--train-data")


def _lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_carry_one_caption_as_text_or_all_of_several(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg_bytes())
    table = _table(tmp_path, _lines(ROWS))
    assert len(table) == 2
    assert table.read_row(0).members == {"jpg": jpeg_bytes(), "txt": b"one"}
    members = table.read_row(1).members
    assert members.keys() == {CAPTION_LIST}  # the image is gone: the decoder counts it
    assert json.loads(members[CAPTION_LIST]) == ["two", "zwei \u00fc"]


def test_blank_lines_and_a_missing_last_line_end_are_no_rows(tmp_path: Path) -> None:
    assert len(_table(tmp_path, "\n" + _lines(ROWS) + "  \r\n" + _lines(ROWS).rstrip())) == 4


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        (("image_path", "caption"), (DataConfig.csv_img_key, DataConfig.csv_caption_key)),
        (("filepath", "title"), (DataConfig.csv_img_key, DataConfig.csv_caption_key)),
        (("file", "text"), ("file", "text")),
    ],
)
def test_the_keys_are_those_given_or_usual(tmp_path: Path, fields: tuple[str, str], keys: tuple[str, str]) -> None:
    table = _table(tmp_path, _lines([{fields[0]: "a.jpg", fields[1]: "c"}]), image=keys[0], caption=keys[1])
    assert (table.images[0], table.captions[0]) == ("a.jpg", "c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"rows.jsonl', line 3 is not JSON \(Expecting"),
        ("[1]", r"line 3 is no JSON object but '\[1\]'"),
        ('{"image_path": "a"}', "line 3 has no field 'caption' .its fields: 'image_path'.: pass --csv-caption-key"),
        ('{"filepath": "a", "title": "b"}', "line 3 has no field 'image_path'.*: pass --csv-img-key"),
        ('{"image_path": 3, "caption": "x"}', "line 3: field 'image_path' is '3', must be the path"),
        ('{"image_path": "a", "caption": null}', "line 3: field 'caption' is 'None', must be a text or"),
        ('{"image_path": "a", "caption": []}', r"line 3: field 'caption' is '\[\]'"),
        ('{"image_path": "a", "caption": ["x", 3]}', "line 3: field 'caption' is"),
        ('{"image_path": "a", "caption": "\\ud800"}', "line 3: half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _table(tmp_path, _lines(ROWS[:1]) + "\n" + line + "\n")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"image_path": "a", "caption": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON .'utf-8' codec"):
        JsonlTable(str(tmp_path / "x.jsonl"), image_key="a", caption_key="b", flag="--train-data")


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"JSON Lines file .* does not exist: correct --train-data"):
        JsonlTable(str(tmp_path / "none.jsonl"), image_key="a", caption_key="b", flag="--train-data")
    with pytest.raises(ValueError, match=r"JSON Lines file .* has no rows"):
        _table(tmp_path, "\n")
