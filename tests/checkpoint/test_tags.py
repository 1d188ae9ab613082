from __future__ import annotations

import pytest

from training.checkpoint.retention import steps_to_delete
from training.checkpoint.tags import Best, Tags, parse_tags, resume_order, rewind_order


def test_tags_survive_the_file() -> None:
    tags = Tags(frozenset({1, 2}), frozenset({3}), Best("top1", 2, 0.5))
    assert parse_tags(tags.to_json()) == tags
    assert parse_tags(Tags().to_json()) == parse_tags("{}") == Tags()


@pytest.mark.parametrize("text", ["", "[]", '{"good": 3}', '{"best": {"metric": "x"}}', '{"suspect": ["x"]}'])
def test_other_text_is_no_tags(text: str) -> None:
    with pytest.raises(ValueError, match=r"not tags|invalid literal|Expecting value"):
        parse_tags(text)


def test_a_suspect_checkpoint_is_not_good_and_does_not_become_so() -> None:
    tags = Tags().with_good(10).with_good(20).with_suspect([20, 30])
    assert (tags.good, tags.suspect) == ({10}, {20, 30})
    assert tags.with_good(30) == tags
    assert tags.without([20, 10]) == Tags(frozenset(), frozenset({30}))


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("top1", [0.1, 0.4, 0.3], 2), ("clip_val_loss", [3.0, 2.0, 2.5], 2), ("text_to_image_mean_rank", [9, 5, 7], 2)],
)
def test_the_best_is_the_highest_but_of_losses_and_ranks_the_lowest(
    metric: str, values: list[float], best: int
) -> None:
    tags = Tags()
    for step, value in enumerate(values, start=1):
        tags = tags.with_metric(metric=metric, step=step, value=value)
    assert tags.best == Best(metric, best, values[best - 1])
    assert tags.with_metric(metric=metric, step=9, value=float("nan")) == tags
    assert tags.with_metric(metric="other", step=9, value=0.0).best == Best("other", 9, 0.0)


def test_a_start_takes_the_newest_and_suspect_ones_last() -> None:
    assert resume_order([10, 20, 30, 40], Tags(suspect=frozenset({40, 30}))) == [20, 10, 40, 30]


def test_a_rewind_prefers_good_ones_with_a_margin_before_the_onset() -> None:
    steps = [100, 200, 300, 400, 500, 600]
    tags = Tags(good=frozenset({100, 200}), suspect=frozenset({400}))
    assert rewind_order(steps, tags, onset=550) == [200, 100, 300, 500]
    assert rewind_order(steps, Tags(), onset=600) == [500, 400, 300, 200, 100]
    assert rewind_order([500, 550], Tags(good=frozenset({500})), onset=551) == [500, 550]
    assert rewind_order([600], Tags(), onset=600) == []


def test_retention_keeps_the_newest_and_never_only_one() -> None:
    assert steps_to_delete([30, 10, 20], keep=2, verified=[30]) == [10]
    assert steps_to_delete([10], keep=2, verified=[10]) == []
    with pytest.raises(ValueError, match=r"keep=1 .*--keep-checkpoints 2"):
        steps_to_delete([1], keep=1, verified=[])


def test_retention_keeps_every_nth_the_best_and_the_newest_good_one() -> None:
    tags = Tags(good=frozenset({10, 20}), best=Best("top1", 50, 0.1))
    assert steps_to_delete(range(10, 101, 10), keep=2, every=40, tags=tags, verified=[100]) == [10, 30, 60, 70]


def test_retention_deletes_nothing_while_nothing_that_stays_was_read_back() -> None:
    assert steps_to_delete([10, 20, 30, 40], keep=2, verified=[10]) == []
    assert steps_to_delete([10, 20, 30, 40], keep=2, tags=Tags(suspect=frozenset({40})), verified=[40]) == []


def test_damaged_checkpoints_count_for_nothing_and_go_when_enough_others_are_there() -> None:
    assert steps_to_delete([10, 20, 30], keep=2, verified=[30], damaged=[20]) == [20]
    assert steps_to_delete([20, 30], keep=2, verified=[30], damaged=[20]) == []
    tags = Tags(good=frozenset({10, 20}))
    assert steps_to_delete([10, 20, 30, 40], keep=2, tags=tags, verified=[40], damaged=[20]) == [20]


def test_suspect_checkpoints_do_not_push_out_sound_ones() -> None:
    tags = Tags(suspect=frozenset({30, 40, 50}))
    assert steps_to_delete([10, 20, 30, 40, 50], keep=2, tags=tags, verified=[20]) == [30]
