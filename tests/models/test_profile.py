from __future__ import annotations

import pytest

from models.config import load_model_config
from models.profile import profile_model
from tests.models.tiny import tiny_config, tiny_model

# OpenCLIP's docs/model_profile.csv: million parameters (all, image, text) and GFLOPs = 2 x GMACs (all, image, text).
PUBLISHED = {
    "ViT-B-32-256": (151.29, 87.86, 63.43, 17.46, 11.5, 5.96),
    "ViT-H-14": (986.11, 632.08, 354.03, 381.68, 334.59, 47.09),
    "ViT-L-14-336": (427.94, 304.29, 123.65, 395.22, 381.92, 13.3),
    "convnext_xxlarge": (1200.58, 846.54, 354.03, 443.03, 395.94, 47.09),
    "RN50x64": (623.26, 420.38, 202.88, 552.65, 529.11, 23.55),
    "ViT-g-14": (1366.68, 1012.65, 354.03, 581.15, 534.06, 47.09),
    "convnext_xxlarge_320": (1200.58, 846.54, 354.03, 665.74, 618.65, 47.09),
    "ViT-bigG-14": (2539.57, 1844.91, 694.66, 1065.36, 967.5, 97.86),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_figures_are_the_published_ones(name: str) -> None:
    profile = profile_model(load_model_config(name))
    millions = (profile.parameters, profile.image_parameters, profile.text_parameters)
    macs = (profile.macs, profile.image_macs, profile.text_macs)
    figures = [round(count / 1e6, 2) for count in millions] + [round(2 * count / 1e9, 2) for count in macs]
    assert figures == pytest.approx(PUBLISHED[name], abs=0.011)


def test_the_parts_add_up_to_the_model() -> None:
    profile = profile_model(tiny_config(init_logit_bias=-10))
    assert profile.parameters == profile.image_parameters + profile.text_parameters + 2
    assert profile.parameters == sum(parameter.numel() for parameter in tiny_model(init_logit_bias=-10).parameters())
