from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from models.config import parse_model_config
from models.factory import build_model

DOC = (Path(__file__).parents[2] / "docs" / "add_a_model.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```", DOC, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["vit", "timm"])
def test_the_examples_of_the_documentation_build(example: str) -> None:
    model = build_model(parse_model_config(json.loads(example), name="example"), device="meta")
    assert model.image_blocks
    assert model.text_blocks
