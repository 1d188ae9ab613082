from __future__ import annotations

import pytest
import timm
import torch

from tests.models.tiny import CONVNEXT, TIMM_VIT, tiny_images, tiny_model


def test_the_trunk_is_timms_own_model() -> None:
    model = tiny_model(CONVNEXT)
    trunk = timm.create_model("convnext_atto", num_classes=0).eval()
    trunk.load_state_dict(model.visual.trunk.state_dict())
    images = tiny_images(size=(64, 64))
    assert torch.equal(model.visual.trunk(images), trunk(images))


def test_drop_path_and_patch_dropout_reach_the_trunk() -> None:
    model = tiny_model({**TIMM_VIT, "patch_dropout": 0.5, "timm_drop_path": 0.3})
    assert model.visual.trunk.patch_drop.prob == 0.5
    assert model.visual.trunk.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_patch_dropout_on_a_convolutional_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'convnext_atto' does not accept .*patch_drop_rate.*--force-patch-dropout"):
        tiny_model({**CONVNEXT, "patch_dropout": 0.5})


def test_an_unknown_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="timm_proj 'conv' is none of"):
        tiny_model({**CONVNEXT, "timm_proj": "conv"})


def test_a_trunk_takes_another_image_size() -> None:
    tower = tiny_model(TIMM_VIT).visual
    tower.set_image_size((96, 128))
    assert tower.image_size == (96, 128)
    assert tower(tiny_images(size=(96, 128))).shape == (2, 24)


def test_a_size_that_the_patches_do_not_tile_is_refused() -> None:
    message = r"\(100, 100\) is not divisible by the patch size \(16, 16\).*--force-image-size"
    with pytest.raises(ValueError, match=message):
        tiny_model(TIMM_VIT).visual.set_image_size((100, 100))


def test_a_configured_size_that_is_not_the_trunks_is_refused() -> None:
    fixed = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 128}
    with pytest.raises(ValueError, match=r"\(128, 128\), its timm trunk for \(224, 224\): .*--force-image-size"):
        tiny_model(fixed).visual.check_image_size()
