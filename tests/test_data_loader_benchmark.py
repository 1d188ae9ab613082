"""The data loader benchmark: our side runs from photos to a table, and its sums are right."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.data_loader import main, ratio, table
from benchmarks.photo_shards import BASE_SHARDS, LINKED_SHARDS, find_photos, make_shards
from tests.factories import jpeg_bytes
from training.data.tar_reader import read_samples


def _photos(directory: Path) -> Path:
    directory.mkdir()
    for name, size in (("a", (90, 60)), ("b", (50, 80))):
        (directory / f"{name}.jpg").write_bytes(jpeg_bytes(size=size))
    return directory


def _round(samples: int, seconds: float, cpu_s: float) -> dict[str, float]:
    return {"samples": samples, "wall_s": seconds, "cpu_s": cpu_s}


def test_a_quick_run_of_our_side_measures_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    arguments = ["--quick", "--arms=clipyard", "--sizes", "40", "--samples=64", "--batch-size=16", "--seconds=1"]
    arguments += [f"--photos={_photos(tmp_path / 'photos')}", f"--directory={tmp_path}", f"--out={out}"]
    assert main(arguments) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    ours = cell["arms"]["clipyard"]
    assert all(ours[name] > 0 for name in ("samples_per_s", "cpu_s_per_1000"))
    assert ours["loader_memory"]["pss_mb"] > 50
    assert ours["stage_us"]["decode"] > 0
    assert "| 40 | default | 1 |" in capsys.readouterr().out


def test_photos_are_resized_to_the_short_side_and_linked(tmp_path: Path) -> None:
    photos = find_photos(_photos(tmp_path / "photos"))
    shards = make_shards(photos, tmp_path, short_side=48, samples=16)
    assert shards.samples == LINKED_SHARDS * 16 // BASE_SHARDS
    with (tmp_path / "48px-16" / "00047.tar").open("rb") as stream:
        samples = [raw.members for raw in read_samples(stream)]
    assert {min(Image.open(io.BytesIO(members["jpg"])).size) for members in samples} == {48}
    assert all(len(members["txt"].split()) >= 3 for members in samples)


def test_the_ratio_is_above_one_when_we_are_faster() -> None:
    ours, theirs = [_round(100, 1, 1), _round(300, 1, 3)], [_round(50, 1, 1), _round(50, 1, 1)]
    assert ratio(ours, theirs) == {"value": 4.0, "low": 2.0, "high": 6.0, "processor_time": 2.0}


def test_a_table_without_the_other_arm_has_no_ratio() -> None:
    arm: dict[str, Any] = {"samples_per_s": 10.0, "cpu_s_per_1000": 1.0, "kb_read_per_sample": 2.0, "stage_us": {}}
    arm |= {name: {"pss_mb": 100, "rss_mb": 100} for name in ("loader_memory", "all_memory")}
    cell = {"short_side": 256, "augmentation": "default", "workers": 2, "arms": {"clipyard": arm}}
    assert (
        table({"cells": [cell]}).splitlines()[-1] == "| 256 | default | 2 | 10 | - | - | - | 1.00 | 50 | 100 | 2 | - |"
    )


def test_a_folder_without_photos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--photos={tmp_path}", f"--directory={tmp_path}"]) == 1
    assert "No photos to make shards of: pass a folder with .jpg or .png files" in capsys.readouterr().err
