"""The gates of speed that need no clock: the counts themselves, and that they are counted right."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import counts
from benchmarks.counts import Count, share_of, times_fewer
from benchmarks.saved_activations import saved_by_us
from benchmarks.step_counts import open_clip_flops
from benchmarks.training_flops import count_flops, training_flops_per_sample


def assert_passed(found: list[Count]) -> None:
    assert found
    assert not any(count.has_failed for count in found), counts.render(found)


@pytest.mark.parametrize("name", ["ViT-B-32-256", "ViT-L-14", "ViT-H-14", "convnext_xxlarge"])
def test_training_takes_fewer_flops_than_open_clip(name: str) -> None:
    found = counts.flops([name], batches=1)
    assert found[0].gate
    assert_passed(found)


def test_hardly_more_text_tokens_are_computed_than_captions_have() -> None:
    assert_passed(counts.text_tokens())


def test_a_block_makes_four_matrix_products() -> None:
    assert_passed(counts.products())


@pytest.mark.parametrize("name", counts.SAVED_MODELS)
def test_little_more_than_half_is_saved_where_no_product_is_computed_again(name: str) -> None:
    saved, again = counts.saved_activations({name: [counts.SAVED_WAY]})
    assert saved.gate
    assert_passed([saved, again])


def test_captions_that_are_kept_for_the_backward_pass_are_as_long_as_the_files() -> None:
    found, expected = counts.typical_captions(16), counts.caption_file()
    assert sum(found) / len(found) == pytest.approx(sum(expected) / len(expected), abs=0.1)


def test_the_loss_exchanges_texts_alone_and_stores_no_logits() -> None:
    assert_passed(counts.loss())


def test_a_loss_that_stores_its_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "OUR_LOSS", counts.THEIR_LOSS)
    assert [count.has_failed for count in counts.loss()] == [True, True, True]


def test_random_batches_share_one_program_per_kind_of_block() -> None:
    found = counts.programs_of_batches(batch_size=8)
    assert (found.first, found.graph_breaks, found.recompiles) == (4, 0, 0)  # two towers, the last block of each


@pytest.mark.parametrize("name", ["demo-vit", "ViT-B-32"])
def test_features_and_gradients_are_open_clips_in_double_precision(name: str) -> None:
    assert_passed(counts.equality([name]))


def test_the_file_of_counts_holds_every_gate_and_its_page_says_so() -> None:
    result = json.loads(counts.RESULT.read_text())
    assert counts.DOCUMENT.read_text() == counts.document(result)
    found = [Count(**row) for row in result["counts"]]
    assert_passed(found)
    gated = {count.metric.split(", ")[1] for count in found if "GFLOPs" in count.metric and count.gate}
    assert gated == counts.FLOP_GATES.keys()


def test_open_clips_own_modules_count_what_padded_towers_do() -> None:
    assert training_flops_per_sample("demo-vit", [8]).padded == open_clip_flops("demo-vit")


def test_useful_flops_are_those_of_each_caption_alone() -> None:
    short, long, both = (training_flops_per_sample("demo-vit", lengths) for lengths in ([5], [16], [5, 16]))
    assert both.useful == (short.useful + long.useful) / 2
    assert short.useful < both.useful < both.computed < both.padded


def test_captions_are_packed_in_batches_of_the_given_size() -> None:
    whole = training_flops_per_sample("demo-vit", [5] * 64 + [16] * 64)
    halves = training_flops_per_sample("demo-vit", [5] * 64 + [16] * 64, batch_size=64)
    assert whole.useful == halves.useful
    assert whole.computed != halves.computed


def test_towers_that_read_the_padding_use_it() -> None:
    found = training_flops_per_sample("ViT-B-16-SigLIP", [5])
    assert found.useful == found.computed


def test_a_tower_of_hugging_face_is_not_counted() -> None:
    with pytest.raises(ValueError, match="'xlm-roberta-base' of model .* cannot be counted without memory"):
        training_flops_per_sample("xlm-roberta-base-ViT-B-32", [5])


def test_a_depthwise_convolution_costs_three_times_forward() -> None:
    inputs = torch.empty(1, 8, 10, 10, device="meta", requires_grad=True)
    depthwise = torch.nn.Conv2d(8, 8, 7, groups=8, padding=3, device="meta")
    assert count_flops(lambda: depthwise(inputs)) == 3 * 2 * 8 * 100 * 49


def test_less_is_saved_by_computing_cheap_things_again() -> None:
    plain, selective = (saved_by_us("demo-vit", [9] * 32, way=way) for way in ("plain", "selective"))
    assert selective < 0.75 * plain


def test_a_gate_fails_where_its_number_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not times_fewer("flops", ours=1.0, open_clip=1.1, bound=1.2).passed
    failing = share_of("bytes", ours=6.0, open_clip=10.0, bound=0.55)
    monkeypatch.setattr(counts, "SECTIONS", {"loss": lambda: [failing]})
    assert counts.main(["--only", "loss"]) == 1
    assert "FAIL, 60.0%" in capsys.readouterr().out


def test_a_target_that_is_missed_is_shown_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = share_of("bytes", ours=6.0, open_clip=10.0, bound=0.55, is_target=True)
    monkeypatch.setattr(counts, "SECTIONS", {"loss": lambda: [missed]})
    assert counts.main(["--check"]) == 0
    assert "| target: 55% | unmet, 60.0% |" in capsys.readouterr().out
