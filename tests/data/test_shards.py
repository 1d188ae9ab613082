from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.factories import write_shards
from training.data.shards import count_samples, expand_shards, require_num_samples


def test_sources_braces_and_factors_expand_in_order(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", shards=2, samples=1)
    shards = expand_shards(f"{first}::pipe:cat x/{{0..2}}.tar", upsampling_factors="1::2.5")
    assert [url.rsplit("/", 1)[-1] for url in shards.urls] == ["000.tar", "001.tar", "0.tar", "1.tar", "2.tar"]
    assert shards.urls[2] == "pipe:cat x/0.tar"
    assert shards.weights == (1.0, 1.0, 2.5, 2.5, 2.5)


def test_globs_and_directories_expand_sorted(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=3, samples=1)
    expected = tuple(str(tmp_path / f"{i:03d}.tar") for i in range(3))
    assert expand_shards(f"{tmp_path}/*.tar").urls == expected
    assert expand_shards(str(tmp_path)).urls == expected


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No shard matches .*/\*\.tar.*--train-data"):
        expand_shards(f"{tmp_path}/*.tar")


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .tar file"):
        expand_shards(str(tmp_path))


def test_missing_shards_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, shards=2, samples=1).replace("001", "003")
    with pytest.raises(ValueError, match=r"2 of 4 shards do not exist, first .*002\.tar"):
        expand_shards(pattern)


def test_factors_must_match_sources() -> None:
    with pytest.raises(ValueError, match="2 upsampling factors for 1 sources"):
        expand_shards("pipe:cat a.tar", upsampling_factors="1::2")


def test_samples_are_counted_from_sizes_json_then_len_then_flag(tmp_path: Path) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=3, samples=5))
    assert count_samples(shards) == 15
    (tmp_path / "sizes.json").unlink()
    assert count_samples(shards) is None
    with pytest.raises(ValueError, match=r"samples in 3 shards is unknown.*--train-num-samples"):
        require_num_samples(None, shards, flag="--train-num-samples")
    assert require_num_samples(7, shards, flag="--train-num-samples") == 7
    (tmp_path / "__len__").write_text("12")
    assert count_samples(shards) == 12


def test_a_shard_missing_in_sizes_json_makes_the_count_unknown(tmp_path: Path) -> None:
    shards = expand_shards(write_shards(tmp_path, shards=2, samples=5))
    (tmp_path / "sizes.json").write_text(json.dumps({"000.tar": 5}))
    assert count_samples(shards) is None


def test_the_digest_depends_on_order_and_weights() -> None:
    digests = {
        expand_shards("pipe:a::pipe:b").digest,
        expand_shards("pipe:b::pipe:a").digest,
        expand_shards("pipe:a::pipe:b", upsampling_factors="1::2").digest,
    }
    assert len(digests) == 3
