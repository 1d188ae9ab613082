from __future__ import annotations

from typing import Any

import open_clip.transformer
import pytest
import torch
from torch import nn

from models.locking import FrozenBatchNorm, lock_image_tower, lock_text_tower
from tests.models.tiny import (
    CONVNEXT,
    RESNET,
    TIMM_RESNET,
    TIMM_VIT,
    model_cfg,
    open_clip_model,
    tiny_images,
    tiny_model,
)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("vision", [{}, {"attentional_pool": True, "attn_pooler_queries": 4}, TIMM_VIT, CONVNEXT])
@pytest.mark.parametrize("groups", [0, 1, 2, 4, 5])
@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")
def test_image_groups_are_those_of_open_clip(vision: dict[str, Any], groups: int) -> None:
    model, reference = tiny_model(vision), open_clip_model(model_cfg(vision))
    lock_image_tower(model, unlocked_groups=groups)
    reference.lock_image_tower(unlocked_groups=groups)
    assert trainable(model) == trainable(reference)


def test_more_groups_than_there_are_unlock_everything() -> None:
    model = tiny_model()
    everything = trainable(model)
    lock_image_tower(model, unlocked_groups=99)
    lock_text_tower(model, unlocked_layers=99)
    assert trainable(model) == everything


def test_a_modified_resnet_has_no_groups() -> None:
    model = tiny_model(RESNET)
    with pytest.raises(ValueError, match="--lock-image-unlocked-groups 1: the ModifiedResNet of 'tiny' has no groups"):
        lock_image_tower(model, unlocked_groups=1)
    lock_image_tower(model)
    assert not [name for name in trainable(model) if name.startswith("visual.")]


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("layers", [0, 1, 2, 3, 5])
def test_text_groups_are_those_of_open_clip(custom_text: bool, layers: int) -> None:
    model, reference = tiny_model(custom_text=custom_text), open_clip_model(model_cfg(custom_text=custom_text))
    lock_text_tower(model, unlocked_layers=layers, freeze_layer_norm=True)
    open_clip.transformer.lock_text_tower(reference, unlocked_layers=layers)
    assert trainable(model) == trainable(reference)


def test_layer_norms_of_a_locked_text_tower_stay_trainable_unless_frozen() -> None:
    model = tiny_model()
    lock_text_tower(model)
    text = [name for name in trainable(model) if not name.startswith(("visual.", "logit_scale"))]
    assert len(text) == 2 * (3 * 2 + 1)
    assert all(".ln_" in name or name.startswith("ln_final") for name in text)
    lock_text_tower(model, freeze_layer_norm=True)
    assert [name for name in trainable(model) if not name.startswith("visual.")] == ["logit_scale"]


def test_a_text_tower_with_a_class_embedding_locks_it() -> None:
    model = tiny_model(text={"embed_cls": True, "proj_type": "none"}, custom_text=True, embed_dim=48)
    lock_text_tower(model, unlocked_layers=1, freeze_layer_norm=True)
    assert not model.text.cls_emb.requires_grad
    assert all(parameter.requires_grad for parameter in model.text.ln_final.parameters())


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="--lock-image-unlocked-groups -1 is negative"):
        lock_image_tower(tiny_model(), unlocked_groups=-1)
    with pytest.raises(ValueError, match="--lock-text-unlocked-layers -1 is negative"):
        lock_text_tower(tiny_model(), unlocked_layers=-1)


@pytest.mark.parametrize("vision", [{**RESNET, "image_size": 64}, {**TIMM_RESNET, "image_size": 64}])
def test_frozen_batch_norms_keep_names_values_and_statistics(vision: dict[str, Any]) -> None:
    model, images = tiny_model(vision), tiny_images(size=(64, 64))
    expected, names = model.encode_image(images), list(model.state_dict())
    lock_image_tower(model, freeze_bn_stats=True)
    model.train()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # what --use-bn-sync does afterwards
    torch.testing.assert_close(model.encode_image(images), expected)
    assert list(model.state_dict()) == names
    assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_without_the_flag_batch_statistics_go_on() -> None:
    model = tiny_model({**RESNET, "image_size": 64})
    lock_image_tower(model)
    before = model.visual.bn1.running_mean.clone()
    model.train().encode_image(tiny_images(size=(64, 64)))
    assert not torch.equal(model.visual.bn1.running_mean, before)


def test_a_partly_unlocked_trunk_freezes_the_norms_of_its_locked_groups() -> None:
    model = tiny_model({**TIMM_RESNET, "image_size": 64})
    lock_image_tower(model, unlocked_groups=1, freeze_bn_stats=True)
    assert isinstance(model.visual.trunk.bn1, FrozenBatchNorm)
    kinds = {type(block.bn1).__name__ for block in model.image_blocks}
    assert "FrozenBatchNorm" in kinds
    assert not any(parameter.requires_grad for parameter in model.visual.trunk.bn1.parameters())
