"""A run goes from phase to phase on a GPU: another image size, text length and batch size in the same process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Outcome
from tests.end_to_end.conftest import run_here as run_here
from tests.test_phases import RECIPES, scaled_recipe

pytestmark = pytest.mark.gpu


def test_a_recipe_runs_scaled_down(run_here: Callable[[Sequence[str]], Outcome], tmp_path: Path) -> None:
    line = scaled_recipe(tmp_path, (RECIPES / "clipa.yaml").read_text())
    outcome = run_here([*line, "--device", "cuda", "--precision", "amp_bf16", "--workers", "2"])
    assert outcome.code == 0, outcome.text
    assert "Position embeddings of 3 x 3 patches are resized to 8 x 8" in outcome.text
    assert "Finished r" in outcome.text
