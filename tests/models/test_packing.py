"""Packed captions give the features and gradients of padded ones, ours and OpenCLIP's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.batches import caption_lengths, caption_tokens
from models.clip import Clip
from models.packing import PackedTexts, pack_texts
from tests.models.tiny import CONTEXT, VOCABULARY, model_cfg, open_clip_model, tiny_images, tiny_model

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LAYER_SCALE = {"ls_init_value": 0.3, "proj_bias": True}
REAL_WIDTH = {"context_length": 77, "vocab_size": 1_000, "width": 512, "heads": 8, "layers": 1}
WEB_LENGTHS = [9, 11, 77, 5, 21, 14, 8, 1, 34, 12]


def captions(lengths: Sequence[int], *, context: int = CONTEXT, vocabulary: int = VOCABULARY) -> Tensor:
    """Random words, the end token, and noise behind it in which nothing may be read: int64 [B, context]."""
    texts = torch.randint(1, vocabulary - 1, (len(lengths), context), generator=torch.Generator().manual_seed(4))
    texts[torch.arange(len(texts)), torch.tensor(lengths) - 1] = vocabulary - 1
    return texts


def features_and_gradients(model: nn.Module, texts: Any) -> dict[str, Tensor]:
    """Of a loss in which every feature has a weight of its own; also of the texts' features themselves."""
    model.zero_grad()
    features = model.encode_text(texts)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (features * weights.to(features)).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **found}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 15
    tolerance = TOLERANCE[found["features"].dtype]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("multiple", [1, 8])
@given(lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=20))
@settings(max_examples=6, deadline=None, derandomize=True)
def test_packed_captions_are_those_of_the_padded_tower(lengths: list[int], multiple: int, dtype: torch.dtype) -> None:
    model, texts = tiny_model(text=LAYER_SCALE).to(dtype), captions(lengths)
    packed = pack_texts(texts, multiple=multiple)
    assert len(packed.tokens) % multiple == 0
    assert_equal(features_and_gradients(model, packed), features_and_gradients(model, texts))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("text", "top", "context"),
    [
        ({}, {}, CONTEXT),
        (LAYER_SCALE, {"custom_text": True, "quick_gelu": True}, CONTEXT),
        ({"proj_type": "none"}, {"embed_dim": 48}, CONTEXT),
        (REAL_WIDTH, {"embed_dim": 512}, 77),
    ],
)
def test_packed_captions_are_those_of_open_clip(
    text: dict[str, Any], top: dict[str, Any], context: int, dtype: torch.dtype
) -> None:
    text = {"layers": 2, **text}
    reference, model = open_clip_model(model_cfg({}, text, **top), seed=0).to(dtype), tiny_model({}, text, **top)
    lengths = [min(length, context) for length in WEB_LENGTHS]
    texts = captions(lengths, context=context, vocabulary=text.get("vocab_size", VOCABULARY))
    found = features_and_gradients(model.to(dtype), pack_texts(texts, multiple=8))
    assert_equal(found, features_and_gradients(reference, texts))


def test_an_eos_token_is_found_where_open_clip_finds_it() -> None:
    """Before higher ids, the first of several; without any, the first token is pooled."""
    text = {"pool_type": "eos", "eos_id": 7}
    model, reference = tiny_model(text=text), open_clip_model(model_cfg({}, text), seed=0)
    texts = captions([12, 12, 12])
    texts[texts == 7] = 8
    texts[0, 4] = texts[0, 9] = texts[1, 0] = 7
    packed = pack_texts(texts, eos_id=7)
    assert packed.lengths.tolist() == [5, 1, 1]
    assert_equal(features_and_gradients(model, packed), features_and_gradients(reference, texts))


def test_every_token_of_a_packed_row_stands_where_the_diagram_says() -> None:
    texts = torch.tensor([[5, 1, 2, 9, 0, 0, 0, 0], [5, 3, 9, 0, 0, 0, 0, 0], [5, 4, 6, 7, 9, 0, 0, 0]])
    packed = pack_texts(texts, multiple=7)
    assert packed.tokens.tolist() == [5, 1, 2, 9, 5, 3, 9, 5, 4, 6, 7, 9, 0, 0]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    assert packed.packing.offsets.tolist() == [0, 4, 7, 12, 14]
    assert packed.packing.ends.tolist() == [3, 6, 11, 13]
    assert (packed.num_texts, packed.context_length, packed.packing.longest) == (3, 8, 8)


def test_packed_texts_share_no_memory_with_the_batch() -> None:
    texts = captions([3, 7])
    packed, twin = pack_texts(texts), pack_texts(texts.clone())
    texts.zero_()
    assert torch.equal(packed.tokens, twin.tokens)


def test_the_first_captions_are_given_back_padded() -> None:
    texts = captions([3, 7, 12])
    first = pack_texts(texts).first(2)
    assert first.tolist() == [texts[0, :3].tolist() + [0] * 4, texts[1, :7].tolist()]


@pytest.mark.parametrize("batch", [32, 64, 256, 896])
def test_web_captions_cost_at_most_a_tenth_more_than_their_tokens(batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    sizes, counts = set(), set()
    for _ in range(20):
        lengths = caption_lengths(batch, context_length=77, generator=generator)
        packed = pack_texts(caption_tokens(lengths, context_length=77, generator=generator))
        computed = sum(group.numel() for group in packed.packing.groups)
        assert len(packed.tokens) <= 1.03 * lengths.sum()
        assert computed <= 1.25 * lengths.sum()
        sizes.add(len(packed.tokens))
        counts.add((len(packed.packing.ends), *(len(group) for group in packed.packing.groups)))
    assert len(counts) == 1, "compiled programs must fit every batch"
    assert batch < 896 or len(sizes) <= 10


def test_captions_of_full_length_cost_no_more_than_padded_ones() -> None:
    packed = pack_texts(captions([77] * 256, context=77))
    assert len(packed.tokens) <= 1.01 * 256 * 77


def test_half_precision_stays_within_its_noise() -> None:
    model, texts = tiny_model(), captions([3, 12, 1, 7])
    with torch.no_grad():
        exact = model.encode_text(texts, normalize=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            padded, packed = (model.encode_text(form, normalize=True) for form in (texts, pack_texts(texts)))
    noise = (padded - exact).abs().max()
    assert (packed - exact).abs().max() <= 1.5 * noise
    assert packed.dtype == torch.float32


@pytest.mark.parametrize("form", [captions, lambda lengths: pack_texts(captions(lengths))])
def test_a_batch_longer_than_the_context_is_refused(form: Callable[[Sequence[int]], Tensor | PackedTexts]) -> None:
    message = r"texts are 12 tokens long, the model's context length is 9: .* --force-context-length 12"
    with pytest.raises(ValueError, match=message):
        tiny_model(text={"context_length": 9}).encode_text(form([3]))


def test_both_towers_run_packed_texts_together() -> None:
    model, texts = tiny_model(), captions([3, 7])
    found, expected = model(tiny_images(2), pack_texts(texts)), model(tiny_images(2), texts)
    torch.testing.assert_close(found.text_features, expected.text_features, atol=1e-6, rtol=0)


def count_flops(model: Clip, texts: Tensor | PackedTexts) -> int:
    with FlopCounterMode(display=False) as counter:
        model.encode_text(texts).sum().backward()
    return int(counter.get_total_flops())


def test_flops_are_counted_as_torch_counts_its_own_attention() -> None:
    model, texts = tiny_model(), captions([CONTEXT] * 8)
    assert count_flops(model, pack_texts(texts)) == pytest.approx(count_flops(model, texts), rel=0.02)
    short = captions([3] * 8)
    assert count_flops(model, pack_texts(short)) < 0.27 * count_flops(model, short)
