"""What a resumed run sees when its data lies elsewhere, or is other data."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from models.config import PreprocessConfig
from tests.factories import character_tokens, token_texts, write_shards
from training.config import DataConfig, ImageConfig
from training.data.build import build_train_loader
from training.data.identity import names_below_root
from training.data.loader import TrainLoader
from training.data.position import StreamIdentity, StreamPosition, read_position


def _loader(train_data: str | None, *, seed: int = 0, batch: int = 2, **data: object) -> TrainLoader:
    config = DataConfig(train_data=train_data, batch_size=batch, workers=0, **data)  # type: ignore[arg-type]
    return build_train_loader(
        config,
        ImageConfig(),
        preprocess=PreprocessConfig(size=(16, 16)),
        tokenizer=character_tokens,  # type: ignore[arg-type]
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=seed,
    )


def _position_after(loader: TrainLoader, batches: int) -> StreamPosition:
    """As it comes back from a checkpoint."""
    for batch in islice(loader, batches):
        loader.commit(batch.record)
    saved = loader.merge([loader.position()])
    return read_position(saved.tensors(), json.loads(json.dumps(saved.facts())))


def _captions(loader: TrainLoader, batches: int) -> list[str]:
    return [text for batch in islice(loader, batches) for text in token_texts(batch.texts)]


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return write_shards(tmp_path / "here", shards=4, samples=8)


def test_shards_that_were_moved_go_on_with_the_very_next_sample(tmp_path: Path, shards: str) -> None:
    whole = _loader(shards)
    position = _position_after(whole, 5)
    expected = _captions(whole, 7)
    shutil.move(tmp_path / "here", tmp_path / "on/another/disk")
    moved = _loader(shards.replace("/here/", "/on/another/disk/"))
    moved.load_position(position)
    assert _captions(moved, 7) == expected
    assert moved.new_stream is None


def test_sources_that_changed_places_have_not_moved(tmp_path: Path, shards: str) -> None:
    other = write_shards(tmp_path / "there", shards=4, samples=8)
    position = _position_after(_loader(f"{shards}::{other}"), 2)
    with pytest.raises(ValueError, match=r"another stream \(sources: saved .*--allow-config-change train-data"):
        _loader(f"{other}::{shards}").load_position(position)


def test_other_weights_of_moved_shards_are_another_stream(shards: str) -> None:
    data = {"dataset_resampled": True}
    two = f"{shards}::{shards}"
    position = _position_after(_loader(two, train_data_upsampling_factors="1::2", **data), 2)
    with pytest.raises(ValueError, match="another stream"):
        _loader(two, train_data_upsampling_factors="1::3", **data).load_position(position)


def test_other_data_that_is_meant_begins_with_the_next_epoch(
    tmp_path: Path, shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    position = _position_after(_loader(shards), 5)  # 10 of 32 samples
    more = write_shards(tmp_path / "more", shards=8, samples=8)
    loader = _loader(more)
    loader.accepts_new_stream = True
    with caplog.at_level(logging.WARNING):
        loader.load_position(position)
    assert "begins with epoch 1. About 22 samples" in caplog.text
    assert loader.new_stream == (1.0, 22)
    assert loader.epoch_of_lanes()[0] == 1.0
    seen = Counter(_captions(loader, 32))
    assert (len(seen), set(seen.values())) == (64, {1})


def test_the_new_data_is_resumed_in_its_turn(tmp_path: Path, shards: str) -> None:
    position = _position_after(_loader(shards), 5)
    more = write_shards(tmp_path / "more", shards=5, samples=6)
    first = _loader(more)
    first.accepts_new_stream = True
    first.load_position(position)
    again = _position_after(first, 3)
    second = _loader(more)
    second.load_position(again)
    assert _captions(second, 6) == _captions(first, 6)


def test_nothing_is_unread_at_the_end_of_an_epoch(tmp_path: Path, shards: str) -> None:
    loader = _loader(write_shards(tmp_path / "more", shards=6, samples=8))
    loader.accepts_new_stream = True
    loader.load_position(_position_after(_loader(shards), 32))
    assert loader.new_stream == (2.0, 0)


def test_another_seed_that_is_named_deals_the_next_epoch_anew(shards: str) -> None:
    loader = _loader(shards, seed=5)
    loader.accepts_new_stream = True
    loader.load_position(_position_after(_loader(shards), 5))
    assert loader.new_stream is not None
    assert loader.new_stream.first_epoch == 1.0
    assert sorted(_captions(loader, 16)) == sorted(_captions(_loader(shards), 16))


def test_resampled_data_goes_on_at_the_same_progress(tmp_path: Path, shards: str) -> None:
    data = {"dataset_resampled": True, "train_num_samples": 32}
    position = _position_after(_loader(shards, **data), 40)  # 2.5 epochs
    loader = _loader(write_shards(tmp_path / "more", shards=8, samples=8), **data)
    loader.accepts_new_stream = True
    loader.load_position(position)
    assert loader.new_stream is not None
    assert loader.new_stream.first_epoch == pytest.approx(2.5, abs=0.2)
    assert loader.new_stream.unread_samples == 0


def test_a_position_that_was_dealt_anew_knows_what_was_read_before(shards: str) -> None:
    dealt = _loader(shards, data_lanes=3)
    dealt.load_position(_position_after(_loader(shards), 5))
    position = _position_after(dealt, 3)
    assert position.progress(slots_per_epoch=16, slot_samples=2.0) == 0.5


def test_a_position_of_an_earlier_version_can_be_read(shards: str) -> None:
    loader = _loader(shards)
    saved = loader.merge([loader.position()])
    facts = {key: value for key, value in saved.facts().items() if key not in StreamIdentity._fields[3:]}
    assert read_position(saved.tensors(), facts).identity.same_stream(loader.identity)
    assert not loader.identity.moved_from(read_position(saved.tensors(), facts).identity)


def test_names_are_relative_to_the_directory_of_all_shards() -> None:
    assert names_below_root(["/a/b/0.tar", "/a/b/1.tar"]) == ["0.tar", "1.tar"]
    assert names_below_root(["/a/b/0.tar", "/a/c/0.tar"]) == ["b/0.tar", "c/0.tar"]
    assert names_below_root(["/a/bc/0.tar", "/a/bd/0.tar"]) == ["bc/0.tar", "bd/0.tar"]
    assert names_below_root(["pipe:aws s3 cp s3://bucket/set/0.tar -"]) == ["0.tar"]
    assert names_below_root(["0.tar", "1.tar"]) == ["0.tar", "1.tar"]
