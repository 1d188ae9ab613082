"""What storage and shards do wrong, seen from the loader: nothing is lost that can be had, and what is lost is counted.

Every fault that is recovered from must give the very samples of an undisturbed run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from models.config import PreprocessConfig
from tests.factories import character_tokens, jpeg_bytes, token_texts, write_shards, write_tar
from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.config import DataConfig, ImageConfig
from training.data.accounting import BadSampleBudget, DataBudgetExceeded
from training.data.build import build_train_loader
from training.data.loader import TrainLoader
from training.data.sources import TarSource
from training.data.storage import AccessDenied, Storage, StorageError, StorageOptions

SHARDS, SAMPLES, BATCH = 8, 12, 12
QUICK = StorageOptions(
    attempts=4, first_delay_s=0.02, longest_delay_s=0.1, read_timeout_s=1, chunk_bytes=4096, chunks_ahead=1
)


def _loader(train_data: str, *, workers: int = 0, storage: StorageOptions = QUICK, samples: int = 96) -> TrainLoader:
    config = DataConfig(train_data=train_data, train_num_samples=samples, batch_size=BATCH, workers=workers)
    loader = build_train_loader(
        config,
        ImageConfig(),
        preprocess=PreprocessConfig(size=(16, 16)),
        tokenizer=character_tokens,  # type: ignore[arg-type]
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=0,
    )
    assert isinstance(loader.source, TarSource)
    loader.source.storage = Storage(storage)
    return loader


def _run(loader: TrainLoader, batches: int = 8) -> list[str]:
    """The captions of some batches, committed as training does."""
    captions = []
    for batch in islice(loader, batches):
        captions += token_texts(batch.texts)
        loader.commit(batch.record)
    return captions


@pytest.fixture
def shards(s3: Bucket, tmp_path: Path) -> str:
    write_shards(tmp_path / "shards", shards=SHARDS, samples=SAMPLES)
    return f"{s3.upload_directory(tmp_path / 'shards')}/{{000..{SHARDS - 1:03d}}}.tar"


def _shard(tmp_path: Path, shard: int) -> bytes:
    return (tmp_path / "shards" / f"{shard:03d}.tar").read_bytes()


RECOVERED = {
    "503": (Fault(times=3, status=503, code="SlowDown"),),
    "500": (Fault(times=1, status=500), Fault(times=1, after=2, status=500)),
    "reset": (Fault(times=2, reset_at=1500),),
    "short": (Fault(times=2, short_at=1500),),
    "stall": (Fault(times=1, stall_at=1500),),
    "trickle": (Fault(times=1, trickle_bytes=512, trickle_s=0.02),),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", RECOVERED)
def test_recovered_faults_change_no_sample(s3: Bucket, shards: str, kind: str, workers: int) -> None:
    undisturbed = _run(_loader(shards))
    for shard in (1, 4):
        s3.faults(f"{shard:03d}.tar", *RECOVERED[kind])
    loader = _loader(shards, workers=workers)
    assert _run(loader) == undisturbed
    assert len(set(undisturbed)) == SHARDS * SAMPLES
    assert loader.totals["lost_samples"] == 0
    assert (loader.totals["retries"] > 0) == (kind != "trickle")


def test_a_missing_shard_is_counted_as_lost_and_the_run_goes_on(s3: Bucket, shards: str) -> None:
    s3.delete("003.tar")
    loader = _loader(shards)
    captions = _run(loader)
    assert len(set(captions)) == (SHARDS - 1) * SAMPLES
    assert not any("number 3 " in caption for caption in captions)
    missing = loader.totals["lost/shard_missing"]
    assert missing >= 4  # the shard is read in four parts
    assert loader.totals["lost_samples"] == 3 * missing
    assert loader.bad_shards == {s3.url("003.tar"): 3 * missing}


def test_the_budget_ends_a_run_that_loses_too_much_and_names_the_shard(s3: Bucket, shards: str) -> None:
    """One of eight shards is missing."""
    s3.delete("003.tar")
    loader = _loader(shards)
    _run(loader, 85)  # the budget is looked at from 1,000 samples on
    BadSampleBudget(0.2).check(loader.totals, worst_shards=lambda: loader.bad_shards)
    with pytest.raises(DataBudgetExceeded, match=r"\d+ of \d+ samples .*'shard_missing': .*shards: s3://\S+/003\.tar"):
        BadSampleBudget(0.1).check(loader.totals, worst_shards=lambda: loader.bad_shards)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["missing", "503", "empty"])
def test_a_source_that_gives_nothing_ends_the_run_soon(
    s3: Bucket, shards: str, tmp_path: Path, fault: str, workers: int
) -> None:
    for shard in range(SHARDS):
        if fault == "503":
            s3.faults(f"{shard:03d}.tar", Fault(status=503, code="SlowDown"))
        elif fault == "missing":
            s3.delete(f"{shard:03d}.tar")
        else:
            s3.put(f"{shard:03d}.tar", write_tar(tmp_path / "empty.tar", []).read_bytes())
    start, cpu = time.monotonic(), time.process_time()
    storage = replace(QUICK, attempts=2)
    with pytest.raises(StorageError, match=r"shards in a row gave no sample \(last: .*\): check the storage"):
        _run(_loader(shards, workers=workers, storage=storage))
    assert time.monotonic() - start < 30
    assert time.process_time() - cpu < 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken")])
def test_denied_access_ends_the_run_at_once_and_loses_nothing(
    s3: Bucket, shards: str, status: int, code: str, workers: int
) -> None:
    for shard in range(SHARDS):
        s3.faults(f"{shard:03d}.tar", Fault(after=16, status=status, code=code))  # in the second epoch
    loader = _loader(shards, workers=workers)
    start = time.monotonic()
    with pytest.raises(AccessDenied, match=rf"may not be read.*{code}"):
        _run(loader, 1000)
    assert time.monotonic() - start < 20
    assert loader.totals["lost_samples"] == 0


def test_the_first_sample_tells_denied_access_before_anything_is_built(s3: Bucket, shards: str) -> None:
    for shard in range(SHARDS):
        s3.faults(f"{shard:03d}.tar", Fault(status=403, code="AccessDenied"))
    with pytest.raises(AccessDenied, match="credentials"):
        _loader(shards).check_first_sample()


@pytest.mark.parametrize("damage", ["cut in data", "cut in a header", "cut between members", "flipped"])
def test_a_damaged_shard_gives_what_lies_before_the_damage(
    s3: Bucket, shards: str, tmp_path: Path, damage: str
) -> None:
    whole = _shard(tmp_path, 2)
    middle = whole.index(b"002-0006.jpg")
    cut = {"cut in data": middle + 700, "cut in a header": middle + 100, "cut between members": middle}.get(damage)
    damaged = whole[:cut] if cut is not None else whole[:middle] + b"X" + whole[middle + 1 :]
    s3.put("002.tar", damaged)
    loader = _loader(shards)
    captions = _run(loader)
    seen = {caption for caption in captions if "number 2 " in caption}
    # Where the next member's header is not there to prove a sample whole, the sample before the damage goes as well.
    assert {f"a photo of number 2 {index}" for index in range(5)} <= seen
    assert seen <= {f"a photo of number 2 {index}" for index in range(6)}
    assert len(set(captions) - seen) == (SHARDS - 1) * SAMPLES
    assert loader.totals["lost/shard_damaged"] >= 4
    assert set(loader.bad_shards) == {s3.url("002.tar")}


def test_a_shard_that_changes_is_counted_and_versions_are_never_mixed(s3: Bucket, shards: str, tmp_path: Path) -> None:
    samples = [(f"005-{index:04d}", {"jpg": jpeg_bytes(), "txt": f"new {index}".encode()}) for index in range(SAMPLES)]
    s3.put("new.tar", write_tar(tmp_path / "new.tar", samples).read_bytes())
    s3.faults("005.tar", Fault(times=1, after=2, replace_with=f"/{s3.name}/new.tar"))
    loader = _loader(shards)
    versions: dict[int, set[bool]] = defaultdict(set)
    for batch in islice(loader, 30):
        for caption, (slot, _, _) in zip(token_texts(batch.texts), batch.record.samples.tolist(), strict=True):
            if loader.source.shard_name(slot).endswith("005.tar"):
                versions[slot].add(caption.startswith("new"))
        loader.commit(batch.record)
    assert all(len(kinds) == 1 for kinds in versions.values())
    assert {True} in versions.values()
    assert loader.totals["lost/shard_changed"] >= 1
    assert loader.totals["lost/shard_damaged"] == 0


def test_an_empty_shard_is_passed_over_and_one_without_images_is_counted(
    s3: Bucket, shards: str, tmp_path: Path
) -> None:
    s3.put("001.tar", write_tar(tmp_path / "empty.tar", []).read_bytes())
    s3.put("002.tar", write_tar(tmp_path / "text.tar", [(f"t{n}", {"txt": b"x"}) for n in range(12)]).read_bytes())
    loader = _loader(shards)
    captions = _run(loader)
    assert len(set(captions)) == (SHARDS - 2) * SAMPLES
    assert loader.totals["skipped/no_image"] >= 12
    assert loader.totals["lost_samples"] == 0
    assert set(loader.bad_shards) == {s3.url("002.tar")}


def test_shards_without_any_usable_sample_end_the_run(s3: Bucket, shards: str, tmp_path: Path) -> None:
    text_only = write_tar(tmp_path / "text.tar", [(f"t{n}", {"txt": b"x"}) for n in range(50)]).read_bytes()
    for shard in range(SHARDS):
        s3.put(f"{shard:03d}.tar", text_only)
    with pytest.raises(ValueError, match=r"samples in a row cannot be used .*no_image.*check --train-data"):
        _run(_loader(shards))
