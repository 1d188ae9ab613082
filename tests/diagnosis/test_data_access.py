"""The ends of the data are read as training reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.s3.client import Bucket
from tests.s3.fixtures import object_server, s3  # noqa: F401 - the object server's fixtures
from tests.s3.server import Fault
from training.config import DataConfig
from training.diagnosis.data_access import has_data, read_shards
from training.diagnosis.findings import Finding, Level


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("0.txt")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    return buffer.getvalue()


def read(train_data: str, **fields: object) -> Finding:
    (finding,) = read_shards(DataConfig(train_data=train_data, **fields))
    return finding


def test_first_and_last_shard_are_read_with_ranges_and_credentials(s3: Bucket):  # noqa: F811
    for number in range(3):
        s3.put(f"{number:02d}.tar", tar_bytes())
    found = read(s3.url("{00..02}.tar"))
    assert (found.level, found.text.startswith("--train-data: 20 KiB of 2 read in")) == (Level.OK, True)
    assert s3.log("00.tar")
    assert s3.log("02.tar")
    assert not s3.log("01.tar")


def test_a_shard_that_is_not_there_or_may_not_be_read_is_said(s3: Bucket):  # noqa: F811
    s3.put("00.tar", tar_bytes())
    missing = read(s3.url("{00..09}.tar"))
    assert (missing.level, missing.shared) == (Level.BAD, True)
    assert "09.tar" in missing.text
    s3.faults("00.tar", Fault(status=403, code="ExpiredToken"))
    denied = read(s3.url("00.tar"))
    assert (denied.level, denied.shared, "00.tar" in denied.text, "ExpiredToken" in denied.text) == (
        Level.BAD,
        True,
        True,
        True,
    )


def test_what_is_no_tar_or_is_empty_is_said(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(b"<html>" * 1000)
    assert "is no tar (no ustar header): correct --train-data" in read(str(tmp_path / "a.tar")).text
    (tmp_path / "a.tar").write_bytes(b"")
    assert "no tar is so short" in read(str(tmp_path / "a.tar")).text
    assert "1 of 1 shards do not exist" in read(str(tmp_path / "b.tar")).text


def test_tables_and_pipes_are_read_too(tmp_path: Path):
    (tmp_path / "t.csv").write_text("filepath\ttitle\n")
    assert read(str(tmp_path / "t.csv")).level is Level.OK
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    assert read(f"pipe:cat {tmp_path}/a.tar").level is Level.OK
    assert read(str(tmp_path / "t.xyz")).level is Level.BAD


def test_synthetic_samples_are_nowhere_to_be_read():
    assert not has_data(DataConfig(dataset_type="synthetic"))
    assert has_data(DataConfig(val_data="x.csv"))
