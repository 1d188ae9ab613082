"""Negative controls of rows 15 to 27 and 47 to 50: what tests/data proves would not hold without its protections.

Each shows the fault doing its harm to a reader without the protection: the tar reader of the standard library,
webdataset's decoder, Pillow without our checks, or our own code with one check taken out.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from PIL import Image, ImageFile

from tests.data.test_data_faults import QUICK, _loader, _run
from tests.data.test_tar_formats import Canary
from tests.factories import jpeg_bytes, write_shards, write_tar
from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.data import image_file, lane_reader, object_store
from training.data.captions import decode_caption
from training.data.image_file import UnusableSample, decode_image
from training.data.object_store import RemoteObject
from training.data.storage import ShardMissing, Storage, StorageError
from training.data.tar_reader import TarError, read_samples

BLOCK = 512


def _tar(tmp_path: Path, samples: int = 4) -> bytes:
    content = [(f"{i:04d}", {"jpg": bytes([i]) * 700, "txt": b"a caption"}) for i in range(samples)]
    return write_tar(tmp_path / "x.tar", content).read_bytes()


def _keys_by_tarfile(data: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as archive:
        return {member.name.partition(".")[0] for member in archive}


@pytest.mark.parametrize("damage", ["cut at a header (row 18)", "header flipped (row 19)"])
def test_tarfile_ends_in_silence_where_a_tar_is_damaged(tmp_path: Path, damage: str) -> None:
    data = bytearray(_tar(tmp_path))
    second = BLOCK + 1024 + BLOCK + BLOCK  # header and data of the first image and caption
    if "cut" in damage:
        del data[second:]
    else:
        data[second + 100] ^= 1
    assert _keys_by_tarfile(bytes(data)) == {"0000"}
    with pytest.raises(TarError):
        list(read_samples(io.BytesIO(bytes(data))))


def test_pillow_with_its_tolerance_on_takes_half_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 20."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert decode_image(jpeg_bytes(size=(400, 400))[:800]).size == (400, 400)


def test_without_the_versions_bytes_of_two_objects_are_mixed(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 27."""
    old, new = b"a" * 20_000, b"b" * 20_000
    url = s3.put("a.tar", old)
    s3.put("new.tar", new)
    s3.faults("a.tar", Fault(after=1, replace_with=f"/{s3.name}/new.tar", ignore_if_match=True))
    get = RemoteObject.get
    monkeypatch.setattr(
        RemoteObject, "get", lambda self, *args, **kwargs: get(self, *args, **kwargs | {"expected": None})
    )
    with Storage(QUICK).open(url) as stream:
        read = b"".join(iter(lambda: stream.read(4096), b""))
    assert {b"a"[0], b"b"[0]} == set(read)


def test_without_a_read_timeout_a_stalled_server_is_waited_for(s3: Bucket) -> None:
    """Row 15 and row 26: as long as the server likes."""
    url = s3.put("a.tar", b"a" * 20_000)
    patience = replace(QUICK, read_timeout_s=30, low_speed_s=30)
    s3.faults("a.tar", Fault(times=1, stall_at=1500, stall_s=2.5))
    began = time.monotonic()
    _read(Storage(patience), url)
    assert time.monotonic() - began > 2.4
    s3.faults("a.tar", Fault(times=1, stall_at=1500, stall_s=60))
    began = time.monotonic()
    assert _read(Storage(QUICK), url) == b"a" * 20_000
    assert time.monotonic() - began < 5


def test_without_attempts_a_server_that_recovers_is_an_error(s3: Bucket) -> None:
    """Rows 23 and 24."""
    url = s3.put("a.tar", b"a" * 20_000)
    for fault in (Fault(times=2, status=503, code="SlowDown"), Fault(times=2, reset_at=1500)):
        s3.faults("a.tar", fault)
        with pytest.raises(StorageError):
            _read(Storage(replace(QUICK, attempts=1)), url)


@pytest.fixture
def shards(s3: Bucket, tmp_path: Path) -> str:
    write_shards(tmp_path / "shards", shards=8, samples=12)
    return f"{s3.upload_directory(tmp_path / 'shards')}/{{000..007}}.tar"


def test_denied_access_that_counts_as_missing_empties_the_data(
    s3: Bucket, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 25: what a reader does that takes every refusal for an empty shard."""
    monkeypatch.setattr(object_store, "AccessDenied", ShardMissing)
    for shard in range(4):
        s3.faults(f"{shard:03d}.tar", Fault(after=4, status=403, code="AccessDenied"))  # from the second epoch on
    loader = _loader(shards)
    _run(loader, 20)
    assert loader.totals["lost_samples"] > 0


def test_without_the_count_of_barren_shards_nothing_is_searched_for_ever(
    s3: Bucket, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 22: the search has to be ended from outside."""
    for shard in range(8):
        s3.delete(f"{shard:03d}.tar")
    slots = []

    def count(self: object, *, found: bool, shard: str, faults: object) -> None:
        slots.append(shard)
        if len(slots) == 500:
            raise KeyboardInterrupt

    monkeypatch.setattr(lane_reader._BarrenSlots, "add", count)
    with pytest.raises(KeyboardInterrupt):
        _run(_loader(shards))


def test_webdatasets_decoder_runs_what_a_tar_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 47."""
    monkeypatch.chdir(tmp_path)
    path = write_tar(tmp_path / "evil.tar", [("a", {"pyd": pickle.dumps(Canary()), "txt": b"a caption"})])
    list(webdataset.WebDataset(str(path), shardshuffle=False).decode("pilrgb"))
    assert (tmp_path / "canary").exists()


def test_a_reader_that_unpacks_writes_where_a_tar_tells_it(tmp_path: Path) -> None:
    """Row 48."""
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("../escaped.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    (tmp_path / "inside").mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "inside", filter="fully_trusted")
    assert (tmp_path / "escaped.txt").exists()


def test_without_the_look_at_the_header_a_bomb_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 49: 40 megapixels in 5 kB; and a tar that expands a thousandfold."""
    buffer = io.BytesIO()
    Image.new("1", (8000, 5000)).save(buffer, "PNG")
    with pytest.raises(UnusableSample, match="image_too_large"):
        decode_image(buffer.getvalue(), max_pixels=10_000_000)
    monkeypatch.setattr(image_file, "check_size", lambda *args, **kwargs: None)
    assert decode_image(buffer.getvalue(), max_pixels=10_000_000).size == (8000, 5000)
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(TarError, match="compressed with gzip"):
        list(read_samples(io.BytesIO(bomb)))


def test_without_the_cap_a_huge_caption_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 50."""
    data = b"a" * 5_000_000
    with pytest.raises(UnusableSample, match="caption_too_long"):
        decode_caption(data)
    monkeypatch.setattr("training.data.captions.MAX_CAPTION_BYTES", 1 << 30)
    assert len(decode_caption(data)) == len(data)


def _read(storage: Storage, url: str) -> bytes:
    with storage.open(url) as stream:
        return b"".join(iter(lambda: stream.read(4096), b""))
