"""Opening evaluation sets: what is read, and that each fault ends the run with its path and flag."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation.builders import (
    CLASS_NAMES,
    captions_of,
    encoded,
    label_of,
    write_class_folders,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)
from tests.factories import write_csv, write_tar
from training.config import DataConfig
from training.evaluation.datasets import (
    open_classification_set,
    open_imagenet,
    open_imagenet_v2,
    open_retrieval_set,
    open_validation_pairs,
    split_directories,
)
from training.evaluation.samples import IndexedTars, SampleSource, StreamedTars


def open_set(directory: Path) -> SampleSource:
    return open_classification_set(str(directory), rank=0, world_size=1).source


def open_pairs(path: str | Path, **options: str) -> SampleSource:
    return open_validation_pairs(DataConfig(val_data=str(path), **options), rank=0, world_size=1)


def test_a_classification_set_gives_images_labels_and_prompts_in_order(tmp_path: Path) -> None:
    found = open_classification_set(str(write_classification_set(tmp_path / "zoo")), rank=0, world_size=1)
    assert found.name == "zoo"
    assert found.prompts.class_names == CLASS_NAMES
    samples = list(found.source.part(0, 1))
    assert found.source.num_samples == len(samples) == 23
    assert [sample.label for sample in samples] == [label_of(n) for n in range(23)]
    assert [sample.image for sample in samples] == [encoded(n) for n in range(23)]
    assert samples[9].origin == f"shard '{tmp_path}/zoo/test/1.tar', sample 's00009'"


def test_more_than_ten_shards_keep_their_numerical_order(tmp_path: Path) -> None:
    source = open_set(write_classification_set(tmp_path / "zoo", samples=24, shards=12))
    assert [sample.label for sample in source.part(0, 1)] == [label_of(n) for n in range(24)]


def test_a_retrieval_set_gives_all_captions_of_an_image(tmp_path: Path) -> None:
    found = open_retrieval_set(str(write_retrieval_set(tmp_path / "flickr")), rank=0, world_size=1)
    assert [list(sample.captions) for sample in found.source.part(0, 1)] == [captions_of(n) for n in range(17)]


def break_remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def break_write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def break_shard(members: dict[str, bytes]) -> Callable[[Path], object]:
    return lambda directory: write_tar(directory / "test" / "1.tar", [("good", GOOD), ("odd", members)])


def break_cut(directory: Path) -> None:
    path = directory / "test" / "2.tar"
    path.write_bytes(path.read_bytes()[:3000])


PNG = encoded(0)
GOOD = {"png": PNG, "cls": b"1"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_remove("test/nshards.txt"), r"nshards.txt' does not exist: write the number of shards"),
        (break_write("test/nshards.txt", "two"), r"nshards.txt' holds 'two', not a number"),
        (break_write("test/nshards.txt", "4"), r"says 4 shards .* but .* has 3 \(3.tar is missing"),
        (break_remove("test/1.tar"), r"says 3 shards .* but .* has 2 \(1.tar is missing"),
        (break_shard({"png": PNG}), r"1.tar', sample 'odd' has no .cls member \(its members: .png\). 1 such"),
        (break_shard({"cls": b"1", "json": b"{}"}), r"sample 'odd' has no image member \(its members: .cls, .json\)"),
        (break_shard({"png": PNG, "cls": b"7"}), r"sample 'odd': label 7 is out of range for the 7 classes"),
        (break_shard({"jpg": b"no jpeg", "cls": b"1"}), r"sample 'odd': its .jpg member is no image"),
        (break_shard({"png": PNG, "cls": b"fox"}), r"sample 'odd': label 'fox' is not a class number"),
        (break_cut, r"2.tar' is damaged \(truncated at byte 3000"),
        (break_write("classnames.txt", "\n"), r"classnames.txt' is empty"),
        (break_write("zeroshot_classification_templates.txt", ""), r"templates.txt' is empty"),
        (break_write("dataset_type.txt", "retrieval"), r"is a retrieval set: give it to --retrieval-data"),
        (break_write("dataset_type.txt", "multilabel"), r"says 'multilabel': --zeroshot-data takes"),
    ],
)
def test_a_faulty_classification_set_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    directory = write_classification_set(tmp_path / "zoo")
    damage(directory)
    with pytest.raises(ValueError, match=message):
        open_set(directory)


def test_a_missing_directory_is_named_with_its_flag(tmp_path: Path) -> None:
    write_classification_set(tmp_path / "zoo")
    for name in ("nowhere", "zoo/test"):
        with pytest.raises(ValueError, match=r"does not exist.* correct --zeroshot-data"):
            open_set(tmp_path / name)
    with pytest.raises(ValueError, match=r"directory '.*/nowhere' does not exist: correct --retrieval-data"):
        open_retrieval_set(str(tmp_path / "nowhere"), rank=0, world_size=1)
    for opener, flag in ((open_imagenet, "--imagenet-val"), (open_imagenet_v2, "--imagenet-v2")):
        with pytest.raises(ValueError, match=f"Directory '.*nowhere' does not exist: correct {flag}"):
            opener(str(tmp_path / "nowhere"), num_classes=2, rank=0)


def test_a_set_without_tars_is_refused(tmp_path: Path) -> None:
    directory = write_retrieval_set(tmp_path / "flickr")
    for path in (directory / "test").glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"flickr/test' holds no .tar file: correct --retrieval-data"):
        open_retrieval_set(str(directory), rank=0, world_size=1)
    (directory / "test" / "0.tar").write_bytes(bytes(1024))
    (directory / "test" / "nshards.txt").write_text("1")
    with pytest.raises(ValueError, match="The 1 shards of --retrieval-data hold no usable sample"):
        open_retrieval_set(str(directory), rank=0, world_size=1)


def test_an_image_without_captions_is_refused_in_a_retrieval_set(tmp_path: Path) -> None:
    directory = write_retrieval_set(tmp_path / "flickr")
    write_tar(directory / "test" / "0.tar", [("a", {"png": PNG, "txt": b"fine"}), ("b", {"png": PNG, "txt": b" \n"})])
    with pytest.raises(ValueError, match=r"0.tar', sample 'b': empty caption"):
        open_retrieval_set(str(directory), rank=0, world_size=1)
    write_tar(directory / "test" / "0.tar", [("a", {"png": PNG})])
    with pytest.raises(ValueError, match=r"sample 'a' has no .txt member"):
        open_retrieval_set(str(directory), rank=0, world_size=1)


def test_imagenet_folders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    source = open_imagenet(str(write_class_folders(tmp_path, ["n2", "n10", "n1"], per_class=2)), num_classes=3, rank=0)
    assert [(sample.origin.split("/")[-2], sample.label) for sample in source.part(0, 1)] == [
        ("n1", 0), ("n1", 0), ("n10", 1), ("n10", 1), ("n2", 2), ("n2", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("nested", ["", "ImageNetV2-matched-frequency"])
def test_imagenet_v2_folders_are_classes_in_numerical_order(tmp_path: Path, nested: str) -> None:
    names = [str(number) for number in range(12)]
    write_class_folders(tmp_path / nested, names, suffix="jpeg")
    source = open_imagenet_v2(str(tmp_path), num_classes=12, rank=0)
    assert [(sample.origin.split("/")[-2], sample.label) for sample in source.part(0, 1)] == [
        (name, number) for number, name in enumerate(names)
    ]


def test_another_number_of_class_folders_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"2 class folders, ImageNet has 1000: correct --imagenet-val, .*--zeroshot"):
        open_imagenet(str(tmp_path), num_classes=1000, rank=0)
    with pytest.raises(ValueError, match=r"has 2 folders, not the folders 0 to 1 of ImageNetV2: correct --imagenet-v2"):
        open_imagenet_v2(str(tmp_path), num_classes=2, rank=0)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ["a"])
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"Class folder '.*/b' holds no image: correct --imagenet-val"):
        open_imagenet(str(tmp_path), num_classes=2, rank=0)


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    assert split_directories(None, flag="--zeroshot-data") == []
    assert split_directories("a/zoo/::b/cars", flag="--zeroshot-data") == ["a/zoo", "b/cars"]
    with pytest.raises(ValueError, match="--zeroshot-data: two directories are called 'zoo'"):
        split_directories("a/zoo::b/zoo/", flag="--zeroshot-data")


def test_local_validation_shards_are_indexed_and_piped_ones_are_streamed(tmp_path: Path) -> None:
    pattern = write_pairs(tmp_path)
    indexed, streamed = open_pairs(pattern), open_pairs(f"pipe:cat {pattern}")
    assert isinstance(indexed, IndexedTars)
    assert isinstance(streamed, StreamedTars)
    assert (indexed.num_samples, streamed.num_samples) == (22, None)
    ours, theirs = list(indexed.part(0, 1)), list(streamed.part(0, 1))
    assert [sample[2:] for sample in ours] == [sample[2:] for sample in theirs]
    assert ours[3].captions == (captions_of(3)[-1],)


def test_samples_that_are_no_pairs_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = {"jpg": PNG, "txt": b"a caption\nof two lines"}
    write_tar(tmp_path / "0.tar", [("a", pair), ("b", {"jpg": PNG}), ("c", {"jpg": PNG, "txt": b" "}), ("d", pair)])
    for path in (f"{tmp_path}/0.tar", f"pipe:cat {tmp_path}/0.tar"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            samples = list(open_pairs(path).part(0, 1))
        assert [sample.origin[-3:] for sample in samples] == ["'a'", "'d'"]
        assert samples[1].captions == ("a caption\nof two lines",)
        assert "--val-data: 2 samples" in caplog.text


def test_image_and_text_keys_choose_the_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": b"x", "left.png": PNG, "txt": b"one", "alt": b"two"})])
    (sample,) = open_pairs(tmp_path / "0.tar", image_key="left.png", text_key="alt").part(0, 1)
    assert (sample.image, sample.captions) == (PNG, ("two",))


def test_a_csv_gives_pairs_in_file_order_without_rows_that_lack_a_caption(tmp_path: Path) -> None:
    path = write_csv(tmp_path, rows=4)
    path.write_text(path.read_text().replace("caption 2", " "))
    source = open_pairs(path)
    assert [sample.captions for sample in source.part(0, 1)] == [("caption 0",), ("caption 1",), ("caption 3",)]
    assert source.num_samples == 3


def test_a_csv_without_images_or_captions_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path, rows=2)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"Row 2 of .*image '1.jpg' does not exist: correct --val-data"):
        open_pairs(path)
    path.write_text("filepath\ttitle\n0.jpg\t\n")
    with pytest.raises(ValueError, match="no caption in any of its 1 rows: correct --csv-caption-key"):
        open_pairs(path)


def test_validation_data_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 1 shards do not exist.* correct --val-data"):
        open_pairs(tmp_path / "none.tar")
    with pytest.raises(ValueError, match="--val-data: pass --dataset-type"):
        open_pairs(tmp_path / "none.parquet")
