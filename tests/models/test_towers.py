from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.timm_tower import timm_blocks
from models.transformer import Attention, LayerNorm
from models.vision_transformer import PatchDropout, VisionTransformer
from tests.models.tiny import CONTEXT, CONVNEXT, RESNET, TIMM_RESNET, TIMM_VIT, tiny_images, tiny_model, tiny_texts


def test_attention_equals_the_written_out_formula() -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, heads=4, causal=True).double(), torch.randn(2, 5, 32).double()
    query, key, value = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    expected = torch.empty_like(x)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = query[..., part] @ key[..., part].mT / 8**0.5
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        expected[..., part] = scores.softmax(-1) @ value[..., part]
    torch.testing.assert_close(attention(x), attention.out_proj(expected), atol=1e-12, rtol=0)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 30 is not divisible by 4 heads"):
        Attention(30, heads=4, causal=False)


def test_no_tower_keeps_a_mask() -> None:
    assert not dict(tiny_model().named_buffers())


def test_text_features_do_not_depend_on_what_follows_the_pooled_token() -> None:
    model, texts = tiny_model(), tiny_texts()
    texts[:, 5] = texts.max()  # the end of the text, also the first of two equal maxima
    changed = texts.clone()
    changed[:, 6:] = 1
    assert torch.equal(model.encode_text(texts), model.encode_text(changed))


def test_bidirectional_text_towers_look_ahead() -> None:
    model, texts = tiny_model(text={"no_causal_mask": True}), tiny_texts()
    texts[:, 5] = texts.max()
    changed = texts.clone()
    changed[:, 6:] = 1
    assert not torch.allclose(model.encode_text(texts), model.encode_text(changed))


def test_texts_may_be_shorter_than_the_context() -> None:
    model, texts = tiny_model(), tiny_texts()
    texts[:, 5] = texts.max()
    torch.testing.assert_close(model.encode_text(texts[:, :6]), model.encode_text(texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("custom_text", [False, True])
def test_texts_longer_than_the_context_are_refused(custom_text: bool) -> None:
    message = r"texts are 13 tokens long, the model's context length is 12: .* --force-context-length 13"
    with pytest.raises(ValueError, match=message):
        tiny_model(custom_text=custom_text).encode_text(tiny_texts(length=CONTEXT + 1))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are \(32, 40\) pixels.*--force-image-size 32 40"):
        tiny_model().encode_image(tiny_images(size=(32, 40)))


def test_patch_dropout_keeps_the_class_token_and_a_random_subset() -> None:
    tokens = torch.arange(2 * 17).reshape(2, 17, 1).float()
    dropout = PatchDropout(0.75)
    torch.manual_seed(0)
    kept = dropout(tokens)
    assert kept.shape == (2, 1 + 4, 1)
    assert torch.equal(kept[:, 0], tokens[:, 0])
    for row, full in zip(kept[..., 0].tolist(), tokens[..., 0].tolist(), strict=True):
        assert len(set(row)) == 5
        assert set(row) <= set(full)
    assert not torch.equal(kept, dropout(tokens))
    assert dropout.eval()(tokens) is tokens


def test_patch_dropout_is_drawn_where_the_images_are() -> None:
    tokens = torch.empty(2, 17, 4, device="meta")
    assert PatchDropout(0.5)(tokens).device.type == "meta"


def test_patch_dropout_acts_in_training_only() -> None:
    model, images = tiny_model(vision={"patch_dropout": 0.5}), tiny_images()
    assert torch.equal(model.encode_image(images), model.encode_image(images))
    model.train()
    assert not torch.equal(model.encode_image(images), model.encode_image(images))


def test_layer_norm_computes_in_the_precision_of_its_weights() -> None:
    norm, x = LayerNorm(64), 1000 + torch.randn(2, 64).bfloat16()
    expected = F.layer_norm(x.float(), (64,)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    ("vision", "count"), [({}, 3), (RESNET, 4), (CONVNEXT, 12), (TIMM_VIT, 6), (TIMM_RESNET, 4)]
)
def test_image_towers_expose_their_repeated_blocks(vision: dict[str, object], count: int) -> None:
    model = tiny_model(vision)
    assert len(model.image_blocks) == count
    assert len({id(block) for block in model.image_blocks}) == count
    inside = {id(module) for module in model.visual.modules()}
    assert all(id(block) in inside for block in model.image_blocks)


def test_blocks_of_blocks_are_not_listed_twice() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    trunk = nn.Module()
    trunk.blocks = nn.ModuleList([nn.ModuleDict({"blocks": inner}), nn.Linear(2, 2)])
    assert timm_blocks(trunk) == list(trunk.blocks)


@pytest.mark.parametrize("custom_text", [False, True])
def test_text_blocks_are_exposed_in_both_layouts(custom_text: bool) -> None:
    assert len(tiny_model(custom_text=custom_text).text_blocks) == 3


def test_native_towers_are_used_wherever_they_can() -> None:
    model = tiny_model(custom_text=True)
    assert isinstance(model.visual, VisionTransformer)
    assert type(model.text).__module__ == "models.text_transformer"
