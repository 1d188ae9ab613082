from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from models.config import PreprocessConfig
from tests.factories import character_tokens, jpeg_bytes, token_texts, write_csv, write_shards, write_tar
from training.config import DataConfig, ImageConfig
from training.data.accounting import skipped
from training.data.batch import Batch
from training.data.build import build_train_loader
from training.data.csv_reader import CsvTable, StringTable
from training.data.epoch import choose_block, choose_lanes, choose_parts, epoch_length, resolve_dataset_type
from training.data.loader import TrainLoader
from training.data.storage import StorageError

PREPROCESS = PreprocessConfig(size=(16, 16))


def _loader(config: DataConfig, *, rank: int = 0, world_size: int = 1, seed: int = 0, **image: object) -> TrainLoader:
    return build_train_loader(
        config,
        ImageConfig(aug_cfg=dict(image)),
        preprocess=PREPROCESS,
        tokenizer=character_tokens,  # type: ignore[arg-type]
        rank=rank,
        world_size=world_size,
        accum_freq=1,
        seed=seed,
    )


def _take(loader: TrainLoader, count: int) -> list[Batch]:
    """Copies of the first batches: the loader writes the next ones over them."""
    return [batch._replace(images=batch.images.clone(), texts=batch.texts.clone()) for batch in islice(loader, count)]


def _captions(batches: list[Batch]) -> list[str]:
    return [text for batch in batches for text in token_texts(batch.texts)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), shards=8, samples=10)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (4, 0)])
def test_one_pass_over_the_slots_shows_every_sample_once(tmp_path: Path, world: int, workers: int) -> None:
    """Eight shards are read in four parts each; twelve samples are three in every part."""
    config = DataConfig(train_data=write_shards(tmp_path, shards=8, samples=12), batch_size=6, workers=workers)
    seen: Counter[str] = Counter()
    for rank in range(world):
        loader = _loader(config, rank=rank, world_size=world)
        assert loader.source.slots_per_epoch == 32
        for batch in islice(loader, 16 // world):
            seen.update(token_texts(batch.texts))
    assert len(seen) == 96
    assert set(seen.values()) == {1}


def test_the_same_seed_gives_the_same_pixels_and_another_seed_another_order(shards: str) -> None:
    config = DataConfig(train_data=shards, batch_size=8, workers=0)
    first, again, other = (list(islice(_loader(config, seed=seed, scale=(0.4, 1.0)), 4)) for seed in (1, 1, 2))
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.texts, b.texts) for a, b in zip(first, again, strict=True)
    )
    assert _captions(first) != _captions(other)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("consumed", [1, 4, 11])
def test_a_resumed_loader_goes_on_with_the_very_next_sample(shards: str, workers: int, consumed: int) -> None:
    config = DataConfig(train_data=shards, batch_size=4, workers=workers, shuffle_block=6)
    whole = _take(_loader(config), 15)
    interrupted = _loader(config)
    for batch in islice(interrupted, consumed):  # the workers are ahead by now: only commits count
        interrupted.commit(batch.record)
    resumed = _loader(config)
    resumed.load_position(interrupted.merge([interrupted.position()]))
    rest = _take(resumed, 15 - consumed)
    assert _captions(rest) == _captions(whole[consumed:])
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[consumed:], strict=True))


def test_an_automatic_number_of_lanes_is_kept_and_another_one_asked_for_is_dealt_anew(shards: str) -> None:
    config = DataConfig(train_data=shards, batch_size=4, workers=0)
    saved = _loader(config)
    position = saved.merge([saved.position()])
    kept, dealt = _loader(config), _loader(replace(config, data_lanes=5))
    kept.load_position(position)
    dealt.load_position(position)
    assert kept.deal.num_lanes == saved.deal.num_lanes == 32
    assert dealt.deal.num_lanes == 5


def test_lanes_that_do_not_suffice_for_more_ranks_are_dealt_anew(shards: str) -> None:
    config = DataConfig(train_data=shards, batch_size=1, workers=0)
    saved = _loader(replace(config, data_lanes=2))
    loaders = [_loader(config, rank=rank, world_size=4) for rank in range(4)]
    for loader in loaders:
        loader.load_position(saved.merge([saved.position()]))
    assert {loader.deal.num_lanes for loader in loaders} == {32}


def test_starting_at_an_epoch_skips_the_slots_of_earlier_ones(tmp_path: Path) -> None:
    config = DataConfig(train_data=write_shards(tmp_path, shards=8, samples=12), batch_size=12, workers=0)
    loader = _loader(config)
    loader.start_at_epoch(1)
    second_epoch = _captions(_take(loader, 8))
    assert Counter(second_epoch) == Counter(_captions(_take(_loader(config), 8)))
    assert second_epoch == _captions(_take(_loader(config), 16))[96:]


def test_resampling_repeats_shards_by_their_weights(shards: str) -> None:
    first, second = shards.replace("000..007", "000..003"), shards.replace("000..007", "004..007")
    config = DataConfig(
        train_data=f"{first}::{second}",
        train_data_upsampling_factors="1::3",
        train_num_samples=80,
        dataset_resampled=True,
        batch_size=10,
        workers=0,
    )
    captions = _captions(_take(_loader(config), 200))
    from_second = sum(int(caption.split()[4]) >= 4 for caption in captions) / len(captions)
    assert from_second == pytest.approx(0.75, abs=0.08)


def test_broken_samples_are_skipped_and_counted_by_reason(tmp_path: Path) -> None:
    samples = [(f"{i}", {"jpg": jpeg_bytes(), "txt": f"good {i}".encode()}) for i in range(6)]
    samples[1] = ("1", {"jpg": b"no image at all", "txt": b"broken"})
    samples[2] = ("2", {"txt": b"image missing"})
    samples[3] = ("3", {"jpg": jpeg_bytes()})
    samples[4] = ("4", {"jpg": jpeg_bytes(), "txt": b" \n"})
    write_tar(tmp_path / "0.tar", samples)
    loader = _loader(DataConfig(train_data=f"{tmp_path}/0.tar", train_num_samples=2, batch_size=2, workers=0))
    batches = _take(loader, 3)
    for batch in batches:
        loader.commit(batch.record)
    assert set(_captions(batches)) == {"good 0", "good 5"}
    reasons = {name.removeprefix("skipped/") for name in loader.totals if name.startswith("skipped/")}
    assert reasons == {"broken_image", "no_image", "no_caption", "empty_caption"}
    assert loader.bad_shards[f"{tmp_path}/0.tar"] == skipped(loader.totals)
    assert loader.merge([loader.position()]).facts()["totals"] == dict(loader.totals)


def test_data_without_a_usable_sample_is_an_error_that_names_the_reasons(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{i}", {"png.exe": b"x", "txt": b"text"}) for i in range(50)])
    loader = _loader(DataConfig(train_data=f"{tmp_path}/0.tar", train_num_samples=50, batch_size=2, workers=0))
    with pytest.raises(ValueError, match=r"1000 samples in a row cannot be used .*no_image.*--image-key"):
        next(iter(loader))


def test_a_truncated_shard_gives_its_whole_samples_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, shards=1, samples=10)
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[:-6000])
    loader = _loader(DataConfig(train_data=str(path), train_num_samples=10, batch_size=3, workers=0))
    seen: Counter[str] = Counter()
    for batch in islice(loader, 12):
        loader.commit(batch.record)
        seen.update(token_texts(batch.texts))
    assert 0 < len(seen) < 10
    assert loader.totals["lost/shard_damaged"] > 0
    assert "truncated" in caplog.text
    assert "000.tar are left out" in caplog.text


def test_a_pipe_command_that_always_fails_ends_the_run_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.lane_reader._MAX_BARREN_S", 0.0)
    monkeypatch.setattr("training.data.storage_errors.time.sleep", lambda seconds: None)
    loader = _loader(
        DataConfig(train_data="pipe:exit 7", dataset_type="webdataset", train_num_samples=9, batch_size=3, workers=0)
    )
    with pytest.raises(StorageError, match=r"2 shards in a row gave no sample.*'exit 7'.*status 7"):
        next(iter(loader))


def test_pipe_commands_read_like_files(shards: str) -> None:
    piped = f"pipe:cat {shards}"
    files = _loader(DataConfig(train_data=shards, batch_size=8, workers=0))
    pipes = _loader(DataConfig(train_data=piped, train_num_samples=80, batch_size=8, workers=0))
    assert _captions(_take(files, 6)) == _captions(_take(pipes, 6))


def test_csv_rows_are_each_shown_once_per_epoch_in_a_new_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path, rows=24)
    loader = _loader(DataConfig(train_data=str(path), batch_size=6, workers=0))
    assert (loader.num_batches, loader.num_samples) == (4, 24)
    captions = _captions(_take(loader, 8))
    assert sorted(captions[:24]) == sorted(captions[24:]) == sorted(f"caption {row}" for row in range(24))
    assert captions[:24] != captions[24:]


def test_a_wrong_csv_column_is_named_with_the_columns_there_are(tmp_path: Path) -> None:
    path = write_csv(tmp_path, rows=2, image_column="image")
    with pytest.raises(ValueError, match=r"no column 'filepath' \(its columns: 'image', 'title'\).*--csv-img-key"):
        _loader(DataConfig(train_data=str(path), batch_size=1))


def test_synthetic_data_needs_no_files_but_a_length() -> None:
    loader = _loader(DataConfig(dataset_type="synthetic", train_num_samples=8, batch_size=4, workers=0))
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert len(set(token_texts(batch.texts))) == 4
    with pytest.raises(ValueError, match="pass --train-num-samples"):
        _loader(DataConfig(dataset_type="synthetic"))


@pytest.mark.parametrize(
    ("samples", "batch", "world", "workers", "batches"),
    [(1000, 10, 1, 4, 100), (1001, 10, 1, 4, 104), (1000, 16, 2, 3, 33), (5, 5, 1, 8, 8), (90, 16, 2, 0, 3)],
)
def test_an_epoch_has_as_many_batches_as_in_open_clip(
    samples: int, batch: int, world: int, workers: int, batches: int
) -> None:
    config = DataConfig(batch_size=batch, workers=workers)
    lengths = epoch_length(config, num_samples=samples, world_size=world, kind="webdataset")
    assert lengths == (batches, batches * batch * world)


def test_too_few_samples_for_a_batch_is_an_error(shards: str) -> None:
    with pytest.raises(ValueError, match=r"80 samples are fewer than one global batch of 128.*--batch-size"):
        _loader(DataConfig(train_data=shards, batch_size=64, workers=0), world_size=2)


@pytest.mark.parametrize(
    ("lanes", "message"), [(1, "1 lanes for 2 ranks"), (33, r"33 lanes for 32 slots.*--data-lanes 32")]
)
def test_a_number_of_lanes_that_cannot_work_is_an_error(shards: str, lanes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _loader(DataConfig(train_data=shards, batch_size=1, data_lanes=lanes), world_size=2)


def test_more_ranks_than_parts_of_shards_is_an_error(shards: str) -> None:
    with pytest.raises(ValueError, match=r"32 slots of data .* for 40 ranks.*--dataset-resampled"):
        _loader(DataConfig(train_data=shards, batch_size=1), world_size=40)


@pytest.mark.parametrize(
    ("slots", "world", "lanes"),
    [(32, 1, 32), (32, 3, 30), (32, 4, 32), (100, 2, 96), (231_350, 1024, 49_152), (48, 1, 48), (60, 1, 48)],
)
def test_lanes_divide_among_the_ranks(slots: int, world: int, lanes: int) -> None:
    assert choose_lanes(slots, world_size=world) == lanes
    assert lanes % world == 0


def test_the_number_of_parts_and_blocks_follows_from_the_data() -> None:
    assert [choose_parts(shards) for shards in (1, 12, 13, 24, 47, 48, 1000)] == [4, 4, 4, 2, 2, 1, 1]
    assert choose_block(49_152, world_size=1024) == 85
    assert choose_block(2, world_size=1) == 2048


def test_no_training_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="No training data: pass --train-data"):
        _loader(DataConfig())


@pytest.mark.parametrize(
    ("path", "kind"),
    [("a.csv", "csv"), ("a.tsv", "csv"), ("a/{0..3}.tar", "webdataset"), ("pipe:cat a.tar -", "webdataset")],
)
def test_the_type_of_data_follows_from_its_name(path: str, kind: str) -> None:
    assert resolve_dataset_type(DataConfig(), path, flag="--train-data") == kind


def test_an_unknown_type_of_data_asks_for_the_flag() -> None:
    with pytest.raises(ValueError, match=r"type of 'a\.parquet'.*--dataset-type"):
        resolve_dataset_type(DataConfig(), "a.parquet", flag="--train-data")


def test_one_bad_shard_at_the_beginning_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=48, samples=2)
    config = DataConfig(train_data=f"{tmp_path}/{{000..047}}.tar", batch_size=2, workers=0, train_num_samples=96)
    loader = _loader(config)
    bad = [(f"{i}", {"jpg": b"broken", "txt": b"x"}) for i in range(200)]
    write_tar(Path(loader.source.shard_name(loader.deal.piece(0, 0).slot)), bad)
    loader.check_first_sample()


def test_a_shard_that_holds_no_sample_is_counted_and_named(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=48, samples=2)
    write_tar(tmp_path / "007.tar", [])
    config = DataConfig(train_data=f"{tmp_path}/{{000..047}}.tar", batch_size=2, workers=0, train_num_samples=96)
    loader = _loader(config)
    for batch in islice(loader, 60):
        loader.commit(batch.record)
    assert loader.totals["lost/shard_empty"] >= 1
    assert loader.totals["lost_samples"] == 0
    assert f"{tmp_path}/007.tar" in loader.bad_shards


@pytest.mark.parametrize("path", ["", ".", "x" * 5000, "/etc/passwd/x.jpg", "a\0b"])
def test_a_row_whose_path_cannot_be_read_is_a_sample_without_an_image(tmp_path: Path, path: str) -> None:
    table = write_csv(tmp_path, rows=2)
    rows = CsvTable(str(table), separator="\t", image_column="filepath", caption_column="title", flag="--train-data")
    rows.images = StringTable(["0.jpg", path])
    assert set(rows.read_row(1).members) == {"txt"}


def test_another_table_of_the_same_name_and_length_is_another_stream(tmp_path: Path) -> None:
    path = write_csv(tmp_path, rows=24)
    config = DataConfig(train_data=str(path), batch_size=6, workers=0)
    before = _loader(config).identity
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert _loader(config).identity != before
