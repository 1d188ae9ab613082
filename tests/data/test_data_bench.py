"""``clipyard data bench``: what it measures, and what it does with bad input."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.factories import jpeg_bytes, write_shards, write_tar
from training.commands.data_bench import Measured, report
from training.commands.main import main

_SHORT = ("--model=demo-vit", "--batch-size=4", "--seconds=0.1")


@pytest.mark.parametrize("workers", [0, 2])
def test_it_reports_rate_stages_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    pattern = write_shards(tmp_path, shards=3, samples=8)
    arguments = [*_SHORT, f"--workers={workers}", "--aug-cfg", "scale=(0.4,1.0)"]
    assert main(["data", "bench", pattern, *arguments]) == 0
    out = capsys.readouterr().out
    assert re.match(r"[\d,]+ samples/s, [\d,]+ per worker \([\d,]+ samples in \d", out)
    for stage in ("read", "decode", "tokenize"):
        assert re.search(rf"^  {stage} +[\d,]+ us per sample +\d+%$", out, flags=re.MULTILINE)
    assert "skipped: none" in out


def test_what_the_device_decodes_is_timed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = write_shards(tmp_path, shards=3, samples=8)
    assert main(["data", "bench", pattern, *_SHORT, "--workers=0", "--decode=gpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^decoding on the device: [\d,]+ us per sample; on the host: 0\.0%$", out, flags=re.MULTILINE)


def test_skipped_samples_are_named_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, blank = {"jpg": jpeg_bytes(), "txt": b"a photo"}, {"jpg": jpeg_bytes(), "txt": b" "}
    path = write_tar(tmp_path / "0.tar", [(f"{i}", blank if i % 2 else good) for i in range(16)])
    assert main(["data", "bench", str(path), *_SHORT, "--workers=0"]) == 0
    assert re.search(r"skipped: empty_caption \d+ \(\d+\.\d+%\)", capsys.readouterr().out)


def test_the_rate_is_per_worker_and_idle_time_is_told() -> None:
    counts = Counter({"read_us": 100_000, "decode_us": 800_000, "tokenize_us": 100_000, "bytes_read": 4_000_000})
    lines = list(report(Measured(1000, 1.0, counts), workers=2))
    assert lines[0] == "1,000 samples/s, 500 per worker (1,000 samples in 1.0 s)"
    assert "waiting for this process, or for a processor: 50% of the workers' time" in lines[4]
    assert lines[5] == "read 4.0 MB/s, 4.0 kB per sample"


def test_shards_that_are_not_there_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "bench", str(tmp_path / "none.tar"), *_SHORT]) == 1
    assert "clipyard data bench: 1 of 1 shards do not exist" in capsys.readouterr().err
