from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.factories import write_shards
from training.data.lanes import drawn_shard, slot_draw
from training.data.manifest import Manifest, read_manifest
from training.data.shards import expand_shards

TWO = "sources: [{name: a, shards: 's3://b/a{0..3}.tar', weight: %s}, {name: b, shards: 's3://b/b{0..1}.tar'}]"


def _read(tmp_path: Path, text: str) -> Manifest:
    path = tmp_path / "sources.yaml"
    path.write_text(text)
    return read_manifest(str(path))


def _with_counts(a: int, b: int, *, weights: str = "share", weight: object = 1) -> str:
    return json.dumps(
        {
            "weights": weights,
            "sources": [
                {"name": "a", "shards": "s3://b/a{0..3}.tar", "weight": weight, "num_samples": a},
                {"name": "b", "shards": "s3://b/b{0..1}.tar", "weight": 1, "num_samples": b},
            ],
        }
    )


def _drawn(manifest: Manifest, *, progress: float, draws: int = 20_000) -> list[float]:
    """The fraction of draws that each shard got."""
    counts = Counter(manifest.schedule.draw(slot_draw(slot, seed=3), progress) for slot in range(draws))
    return [counts[shard] / draws for shard in range(len(manifest.shards.urls))]


def test_sources_are_listed_in_order_with_names_and_counts(tmp_path: Path) -> None:
    manifest = _read(tmp_path, _with_counts(4000, 100))
    assert manifest.names == ("a", "b")
    assert manifest.num_samples == 4100
    assert manifest.shards.urls[3:5] == ("s3://b/a3.tar", "s3://b/b0.tar")
    assert manifest.shards.source_of_shard.tolist() == [0, 0, 0, 0, 1, 1]


def test_local_shards_are_relative_to_the_manifest_and_counted(tmp_path: Path) -> None:
    write_shards(tmp_path / "here", shards=3, samples=2)
    manifest = _read(tmp_path, "sources: [{name: x, shards: 'here/{000..002}.tar'}, {name: y, shards: [here]}]")
    assert manifest.num_samples == 12
    assert manifest.shards.urls[0] == f"{tmp_path}/here/000.tar"
    assert len(manifest.shards.urls) == 6


def test_weights_per_shard_mean_what_upsampling_factors_mean(tmp_path: Path) -> None:
    manifest = _read(tmp_path, TWO % 2.5)
    shards = expand_shards("s3://b/a{0..3}.tar::s3://b/b{0..1}.tar", upsampling_factors="2.5::1")
    assert manifest.shards.weights == shards.weights
    cumulative = np.cumsum(shards.weights)
    for slot in range(5000):
        expected = drawn_shard(slot, cumulative_weights=cumulative, seed=3)
        assert manifest.schedule.draw(slot_draw(slot, seed=3), 0.0) == expected


def test_shares_are_fractions_of_the_samples_not_of_the_shards(tmp_path: Path) -> None:
    manifest = _read(tmp_path, _with_counts(4000, 100, weight=3))  # 1000 and 50 samples in a shard
    drawn = _drawn(manifest, progress=0)
    samples = np.array(drawn) * ([1000] * 4 + [50] * 2)
    assert samples[:4].sum() / samples.sum() == pytest.approx(0.75, abs=0.02)
    assert drawn[0] == pytest.approx(drawn[3], abs=0.01)


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 1.0), (2, 1.0), (4, 2.0), (6, 3.0), (7, 3.0), (100, 3.0), (5.0004, 2.5), (5.5, 2.75)]
)
def test_a_schedule_is_linear_between_its_points_and_constant_outside(
    tmp_path: Path, progress: float, expected: float
) -> None:
    manifest = _read(tmp_path, TWO % "[[2, 1], [6, 3]]")
    first = manifest.schedule.cumulative(progress)[0]
    assert first == pytest.approx(4 * expected / (4 * expected + 2), rel=1e-9)


def test_a_source_of_weight_zero_comes_only_when_its_weight_does(tmp_path: Path) -> None:
    manifest = _read(tmp_path, TWO % "[[1, 0], [2, 1]]")
    assert sum(_drawn(manifest, progress=0.5)[:4]) == 0
    assert sum(_drawn(manifest, progress=3)[:4]) == pytest.approx(2 / 3, abs=0.02)


def test_every_number_draws_a_shard_of_a_source_that_has_weight(tmp_path: Path) -> None:
    for weight in ("0", "1", "[[0, 1e-300], [1, 1e9]]"):
        schedule = _read(tmp_path, TWO % weight).schedule
        for uniform in (0.0, 0.5, 1 - 2**-53, 1.0):
            assert 0 <= schedule.draw(uniform, 0.0) < 6
    last = _read(tmp_path, "sources: [{name: a, shards: 'pipe:a'}, {name: b, shards: 'pipe:b', weight: 0}]")
    assert last.schedule.draw(1.0, 0.0) == 0


def test_draws_do_not_depend_on_what_was_drawn_before_nor_on_pickling(tmp_path: Path) -> None:
    schedule = _read(tmp_path, TWO % "[[0, 1], [10, 9]]").schedule
    fresh = pickle.loads(pickle.dumps(schedule))
    points = [(slot_draw(slot, seed=1), slot / 7) for slot in range(70)]
    forward = [schedule.draw(*point) for point in points]
    assert [fresh.draw(*point) for point in reversed(points)] == forward[::-1]
    assert len(pickle.dumps(schedule)) < 2000


@pytest.mark.parametrize(
    ("weight", "needed"), [("1", False), ("2", True), ("[[0, 1], [5, 1]]", False), ("[[0, 1], [5, 2]]", True)]
)
def test_epochs_without_repetition_serve_only_equal_constant_weights(tmp_path: Path, weight: str, needed: bool) -> None:
    assert _read(tmp_path, TWO % weight).needs_resampling is needed


def test_equal_weights_are_equal_whatever_the_number_of_shards(tmp_path: Path) -> None:
    text = "sources: [{name: a, shards: 'pipe:{0..2}', weight: 0.1}, {name: b, shards: 'pipe:{0..48}', weight: 0.1}]"
    assert not _read(tmp_path, text).needs_resampling


def test_the_digest_depends_on_schedules_and_names(tmp_path: Path) -> None:
    texts = [
        TWO % 1,
        TWO % 2,
        TWO % "[[0, 1], [5, 2]]",
        TWO % "[[0, 1], [6, 2]]",
        (TWO % 1).replace("name: a", "name: c"),
    ]
    assert len({_read(tmp_path, text).digest for text in texts}) == 5
    assert _read(tmp_path, TWO % 1).digest == _read(tmp_path, TWO % 1).digest


def test_hundreds_of_sources_are_read_and_drawn_quickly(tmp_path: Path) -> None:
    sources = [
        {"name": str(i), "shards": f"s3://b/{i}/{{0..499}}.tar", "weight": [[0, 1], [i + 1, 2]], "num_samples": 10}
        for i in range(400)
    ]
    start = time.process_time()
    manifest = _read(tmp_path, json.dumps({"sources": sources}))
    assert len(manifest.shards.urls) == 200_000
    for slot in range(1000):
        manifest.schedule.draw(slot_draw(slot, seed=0), slot / 10)
    assert time.process_time() - start < 5  # 1 s on an idle core


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "is neither YAML nor JSON"),
        ("[]", "no list of 'sources'"),
        ("sources: []", "no list of 'sources'"),
        ("{weight: share, sources: [{name: a}]}", "unknown field 'weight', known are sources, weights"),
        ("{weights: equal, sources: [{name: a}]}", "'weights' is 'equal', must be 'per-shard' or 'share'"),
        ("sources: [{shards: x}]", "source number 1 has no 'name'"),
        ("sources: [{name: a, shard: x}]", "source 'a': unknown field 'shard'"),
        ("sources: [{name: a, shards: 'pipe:x'}, {name: a, shards: 'pipe:y'}]", "source 'a': another source has that"),
        ("sources: [{name: a, shards: 3}]", "source 'a': 'shards' must be a pattern"),
        ("sources: [{name: a}]", "source 'a': 'shards' must be a pattern"),
        (
            "sources: [{name: a, shards: 'nowhere/*.tar'}]",
            "source 'a': No shard matches .*correct the path given to 's",
        ),
        ("sources: [{name: a, shards: 'pipe:x', weight: -1}]", "source 'a': 'weight' is -1, must be"),
        ("sources: [{name: a, shards: 'pipe:x', weight: .nan}]", "source 'a': 'weight' is nan"),
        ("sources: [{name: a, shards: 'pipe:x', weight: [[1, 1], [0, 1]]}]", r"'weight' is \[\[1, 1\], \[0, 1\]\]"),
        ("sources: [{name: a, shards: 'pipe:x', weight: [1, 2]}]", "source 'a': 'weight' is"),
        ("sources: [{name: a, shards: 'pipe:x', num_samples: 1.5}]", "source 'a': 'num_samples' is 1.5"),
        ("sources: [{name: a, shards: 'pipe:x', num_samples: 0}]", "source 'a': 'num_samples' is 0"),
        ("sources: [{name: a, shards: 'pipe:x', weight: [[0, 1], [2, 0]]}]", "weights of all sources are 0 at epoch 2"),
        ("{weights: share, sources: [{name: a, shards: 'pipe:x'}]}", "source 'a': 'weights: share' needs its number"),
    ],
)
def test_errors_name_file_source_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"Manifest '.*sources\.yaml'.*{message}"):
        _read(tmp_path, text)


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    assert (
        _read(tmp_path, "sources: [{name: a, shards: 'pipe:x', weight: 1e2, num_samples: 4e8}]").num_samples
        == 400_000_000
    )


def test_a_manifest_may_be_json_with_tabs(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"sources": [{"name": "a", "shards": "pipe:x"}]}, indent="\t"))
    assert read_manifest(str(path)).names == ("a",)


def test_a_missing_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: correct --train-data-manifest"):
        read_manifest(f"{tmp_path}/none.yaml")
