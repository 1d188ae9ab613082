"""The commands that look at data: what they count, what they find broken, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.factories import jpeg_bytes, write_shards, write_tar
from training.commands.main import find_command, main
from training.data.contact_sheet import paint_sheet
from training.data.inspection import spread
from training.data.tar_reader import read_samples


def _write_broken(directory: Path) -> str:
    """Two shards: one with four faults of four kinds among six samples, one cut off in its second sample."""
    directory.mkdir(exist_ok=True)
    image = jpeg_bytes(size=(300, 200))
    samples = [
        ("good", {"jpg": image, "txt": b"a photo"}),
        ("html", {"jpg": b"<html>403 Forbidden</html>", "txt": b"a photo"}),
        ("blank", {"jpg": image, "txt": b"  \n"}),
        ("imageless", {"txt": b"a photo"}),
        ("textless", {"png": image}),
        ("good2", {"JPG": image, "txt": b"a cat"}),
    ]
    write_tar(directory / "0.tar", samples)
    data = write_tar(directory / "1.tar", samples[:1] * 2).read_bytes()
    (directory / "1.tar").write_bytes(data[:4500])
    return f"{directory}/{{0..1}}.tar"


def test_inspect_counts_and_paints_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path, shards=3, samples=4)
    assert main(["data", "inspect", pattern, "--out", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "3 shards, 12 samples by sizes.json" in out
    assert "read 12 samples" in out
    assert "3 of them to the end" in out
    assert "members: jpg 12, txt 12" in out
    assert "images: JPEG 12" in out
    rows = {line.split("  ")[1]: line.split()[-5:] for line in out.splitlines() if line.startswith("  ")}
    assert rows["width, px"] == ["40"] * 5
    assert rows["short side, px"] == ["32"] * 5
    assert rows["caption, tokens"] == ["8"] * 5  # "a photo of number 0 0" with begin and end
    assert "broken: none" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (7 * 136 + 8, 2 * 198 + 8)


def test_inspect_names_what_is_broken_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = _write_broken(tmp_path)
    assert main(["data", "inspect", pattern, "--all"]) == 1
    out = capsys.readouterr().out
    assert "read 7 samples" in out
    assert "2 shards, no complete sizes.json" in out
    assert "1 of them to the end" in out
    assert f"{tmp_path}/1.tar: damaged shard: truncated at byte 4500" in out
    with open(tmp_path / "0.tar", "rb") as shard:
        offsets = {sample.key: sample.offset for sample in read_samples(shard)}
    for key, reason in [
        ("html", "broken_image"),
        ("blank", "empty_caption"),
        ("imageless", "no_image"),
        ("textless", "no_caption"),
    ]:
        assert f"{tmp_path}/0.tar, sample '{key}' at byte {offsets[key]}: {reason}" in out


def test_inspect_reads_no_more_than_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path, shards=4, samples=5)
    assert main(["data", "inspect", pattern, "--samples", "6"]) == 0
    assert "read 6 samples" in capsys.readouterr().out


@pytest.mark.parametrize("num_samples", [1, 7, 1000])
def test_a_bounded_look_is_spread_over_the_shards(num_samples: int) -> None:
    urls = [str(index) for index in range(1000)]
    chosen = list(spread(urls, num_samples))
    assert sum(quota for _, quota in chosen) == num_samples
    assert len({url for url, _ in chosen}) == len(chosen) == min(16, num_samples)


def test_inspect_reads_captions_from_json_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": jpeg_bytes(), "json": b'{"long": "a cat on a mat"}'})])
    assert main(["data", "inspect", f"{tmp_path}/0.tar", "--json-text-key", "short;long"]) == 0
    assert "caption, chars        14" in capsys.readouterr().out


def test_inspect_takes_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "a", shards=2, samples=1)
    (tmp_path / "m.yaml").write_text("sources: [{name: a, shards: a}, {name: b, shards: a}]")
    assert main(["data", "inspect", str(tmp_path / "m.yaml")]) == 0
    assert "4 shards of 2 sources, 4 samples by sizes.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [("none/*.tar", "No shard matches"), ("none.yaml", "Manifest 'none.yaml' does not exist")],
)
def test_inspect_of_nothing_is_one_line(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", url]) == 1
    assert message in capsys.readouterr().err


def test_index_writes_counts_and_offsets_that_reading_may_begin_at(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, shards=2, samples=5)
    (tmp_path / "sizes.json").write_text('{"000.tar": 99, "other.tar": 7}')
    assert main(["data", "index", pattern]) == 0
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"000.tar": 5, "001.tar": 5, "other.tar": 7}
    with open(tmp_path / "001.tar.idx", "rb") as file:
        offsets = np.load(file)
    assert offsets.dtype == np.dtype("<u8")
    with open(tmp_path / "001.tar", "rb") as shard:
        shard.seek(int(offsets[3]))
        assert [sample.key for sample in read_samples(shard, offset=int(offsets[3]))] == ["001-0003", "001-0004"]


def test_index_leaves_out_damaged_shards_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = _write_broken(tmp_path)
    (tmp_path / "sizes.json").write_text('{"1.tar": 2}')
    (tmp_path / "1.tar.idx").write_bytes(b"stale")
    assert main(["data", "index", pattern, "--workers", "2"]) == 1
    captured = capsys.readouterr()
    assert f"{tmp_path}/1.tar: truncated at byte 4500" in captured.err
    assert "1 shards indexed, 6 samples; 1 shards damaged" in captured.out
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"0.tar": 6}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.idx", "1.tar", "sizes.json"]


def test_index_of_what_is_not_local_goes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path / "a", shards=2, samples=3)
    assert main(["data", "index", f"pipe:cat {pattern}"]) == 1
    assert "is not a local file: pass --out DIR" in capsys.readouterr().err
    assert main(["data", "index", f"pipe:cat {pattern}", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"000.tar": 3, "001.tar": 3}


def test_index_refuses_shards_that_would_share_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns = "::".join(write_shards(tmp_path / name, shards=1, samples=1) for name in ("a", "b"))
    assert main(["data", "index", patterns, "--out", str(tmp_path / "out")]) == 1
    assert "would share" in capsys.readouterr().err


def test_index_does_not_touch_a_sizes_json_that_is_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = write_shards(tmp_path, shards=1, samples=1)
    (tmp_path / "sizes.json").write_text("[1]")
    assert main(["data", "index", pattern]) == 1
    assert "sizes.json is no JSON object" in capsys.readouterr().err
    assert (tmp_path / "sizes.json").read_text() == "[1]"


def test_a_sheet_holds_any_shape_and_any_caption() -> None:
    shapes = [(1, 1), (2000, 3), (3, 2000), (64, 64)]
    captions = ["W" * 200, "\u4e2d\u6587 \u05e2\u05d1 \U0001f600", "", "a\n\tb\x00"]
    cells = [(Image.new("RGB", shape, (255, 0, 0)), text) for shape, text in zip(shapes, captions, strict=True)]
    sheet = paint_sheet(cells, columns=4).convert("RGB")
    assert sheet.size == (4 * 136 + 8, 206)
    assert np.asarray(sheet)[8:136, 8:136, 0].min() > 200  # a pixel fills its cell
    assert np.asarray(sheet)[:, 4:8].min() > 240  # margins stay free


def test_the_data_commands_are_found_and_help_needs_none_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ("inspect", "index", "bench", "trace"))
    assert main(["data", "indx"]) == 2
    assert "clipyard data: unknown command 'indx': did you mean index?" in capsys.readouterr().err
    assert find_command("data").module == "training.commands.data"
