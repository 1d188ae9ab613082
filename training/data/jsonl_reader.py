"""Reads image paths and captions, one or several per image, from a JSON Lines file; ``csv_reader`` serves them.

{"image_path": "a/0.jpg", "caption": "a dog"}
{"image_path": "a/1.jpg", "caption": ["a cat", "a cat on a mat"]}
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from training.config import DataConfig
from training.data.captions import CAPTION_LIST
from training.data.csv_reader import CsvTable, StringTable
from training.data.tar_reader import RawSample

_KEY_PAIRS = (("image_path", "caption"), (DataConfig.csv_img_key, DataConfig.csv_caption_key))


class JsonlTable(CsvTable):
    """Rows of (image path, captions). A relative path that does not exist as written is taken relative to the file.

    Args:
        path: of the file; blank lines in it are ignored.
        image_key: of every row. If both keys are the defaults of CSV files, ``image_path`` and ``caption`` are looked
            for first; the first row decides for all.
        caption_key: a text, or a list of texts of which one is chosen at every visit.

    Raises:
        ValueError: a line is no row; the message names file, line and field.
    """

    def __init__(self, path: str, *, image_key: str, caption_key: str, flag: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"JSON Lines file {path!r} does not exist: correct {flag}.")
        keys = (image_key, caption_key)
        pairs = _KEY_PAIRS if keys == _KEY_PAIRS[-1] else (keys,)
        images: list[str] = []
        captions: list[str] = []
        several: list[bool] = []
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path!r}, line {number}"
                row = _parse_line(line, where)
                if not images:
                    pairs = (next((pair for pair in pairs if set(pair) <= row.keys()), pairs[0]),)
                image, caption = _parse_row(row, *pairs[0], where)
                images.append(image)
                several.append(isinstance(caption, list))
                captions.append(json.dumps(caption) if isinstance(caption, list) else caption)
        if not images:
            raise ValueError(f"JSON Lines file {path!r} has no rows: correct {flag}.")
        self.path = path
        self.directory = os.path.dirname(path)
        self.images = StringTable(images)
        self.captions = StringTable(captions)
        self._several = np.array(several)

    def read_row(self, row: int) -> RawSample:
        """The row's file and captions; a missing file gives a sample without an image, which the decoder counts."""
        sample = super().read_row(row)
        if self._several[row]:
            sample.members[CAPTION_LIST] = sample.members.pop("txt")
        return sample


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): correct or remove it.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object but {str(row)[:40]!r}: correct or remove it.")
    return row


def _parse_row(row: dict[str, Any], image_key: str, caption_key: str, where: str) -> tuple[str, str | list[str]]:
    for key, key_flag in ((image_key, "--csv-img-key"), (caption_key, "--csv-caption-key")):
        if key not in row:
            raise ValueError(
                f"{where} has no field {key!r} (its fields: {', '.join(map(repr, row))}): pass {key_flag}."
            )
    image, caption = row[image_key], row[caption_key]
    if not isinstance(image, str) or not image:
        raise ValueError(f"{where}: field {image_key!r} is {str(image)[:40]!r}, must be the path of an image.")
    texts = caption if isinstance(caption, list) else [caption]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: field {caption_key!r} is {str(caption)[:40]!r}, must be a text or a list of texts.")
    try:
        image.encode(), "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: half of a surrogate pair in field {image_key!r} or {caption_key!r}.") from None
    return image, caption
