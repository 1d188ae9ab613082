"""Dealing and batching: every sample exactly once for any number of ranks and processes, and no silent gaps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evaluation.builders import (
    PREPROCESS,
    captions_of,
    draw_image,
    encoded,
    loading,
    tokenizer,
    write_class_folders,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)
from tests.factories import write_csv, write_tar
from training.config import DataConfig
from training.data.transforms import build_eval_transform
from training.evaluation.batches import evaluation_batches
from training.evaluation.datasets import (
    open_classification_set,
    open_imagenet,
    open_retrieval_set,
    open_validation_pairs,
)
from training.evaluation.samples import SampleSource


def sources(directory: Path) -> dict[str, SampleSource]:
    pairs = write_pairs(directory / "pairs", shards=3)
    csv = DataConfig(val_data=str(write_csv(directory / "csv", rows=9)))
    streamed = DataConfig(val_data=f"pipe:cat {pairs}")
    folders = write_class_folders(directory / "folders", ["a", "b", "c"], per_class=3)
    zoo = write_classification_set(directory / "zoo")
    return {
        "tars": open_classification_set(str(zoo), rank=0, world_size=1).source,
        "csv": open_validation_pairs(csv, rank=0, world_size=1),
        "stream": open_validation_pairs(streamed, rank=0, world_size=1),
        "folders": open_imagenet(str(folders), num_classes=3, rank=0),
    }


def test_every_sample_belongs_to_exactly_one_part(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        whole = list(source.part(0, 1))
        assert [sample.position for sample in whole] == sorted({sample.position for sample in whole})
        for num_parts in (2, 3, 7, 40):
            dealt = [sample for part in range(num_parts) for sample in source.part(part, num_parts)]
            assert sorted(dealt) == whole, (name, num_parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_processes_together_see_every_sample_once(tmp_path: Path, workers: int) -> None:
    source = open_classification_set(str(write_classification_set(tmp_path / "zoo")), rank=0, world_size=1).source
    seen: list[int] = []
    for rank in range(2):
        batches = list(evaluation_batches(source, loading(rank=rank, world_size=2, workers=workers)))
        positions = [position for batch in batches for position in batch.positions.tolist()]
        assert all(position % 2 == rank for position in positions)
        assert max(len(batch.images) for batch in batches) <= 5
        seen += positions
    assert sorted(seen) == list(range(23))


def test_a_batch_holds_transformed_images_and_the_captions_of_each(tmp_path: Path) -> None:
    source = open_retrieval_set(str(write_retrieval_set(tmp_path / "flickr")), rank=0, world_size=1).source
    batch = next(iter(evaluation_batches(source, loading())))
    transform = build_eval_transform(PREPROCESS)
    torch.testing.assert_close(batch.images.shape, torch.Size([5, 3, 32, 32]))
    difference = batch.images[2].float() - transform(draw_image(2)).float()
    assert difference.abs().mean() < 8  # lossy WebP
    captions = [caption for n in range(5) for caption in captions_of(n)]
    assert torch.equal(batch.texts, tokenizer()(captions))
    assert batch.text_owners.tolist() == [n for n in range(5) for _ in captions_of(n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_the_evaluation_and_is_named(tmp_path: Path, workers: int) -> None:
    directory = write_classification_set(tmp_path / "zoo")
    (directory / "test" / "1.tar").unlink()
    write_tar(directory / "test" / "1.tar", [("dull", {"png": encoded(1)[:120], "cls": b"0"})])
    source = open_classification_set(str(directory), rank=0, world_size=1).source
    message = r"^Shard '.*/zoo/test/1.tar', sample 'dull': broken image. An evaluation never leaves samples out"
    with pytest.raises(ValueError, match=message):
        list(evaluation_batches(source, loading(workers=workers)))


def test_a_csv_image_that_vanished_ends_the_evaluation(tmp_path: Path) -> None:
    source = open_validation_pairs(DataConfig(val_data=str(write_csv(tmp_path, rows=3))), rank=0, world_size=1)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match="File '1.jpg' of --val-data does not exist"):
        list(evaluation_batches(source, loading()))


def test_a_failing_stream_ends_the_evaluation(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, shards=1)
    source = open_validation_pairs(DataConfig(val_data=f"pipe:cat {pairs}; exit 3"), rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"ended with status 3.* \(--val-data\)"):
        list(evaluation_batches(source, loading()))
