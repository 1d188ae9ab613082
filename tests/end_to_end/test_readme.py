"""The README's Python lines do what it says, with a checkpoint that was trained here and is loaded by OpenCLIP."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import pytest
import torch

from models.factory import create_model
from tests.end_to_end.conftest import REPOSITORY, Outcome
from training.data.demo import make_demo_data
from training.data.demo_samples import DemoSpec

Run = Callable[[Sequence[str]], Outcome]


@pytest.fixture
def trained(run_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `make demo` leaves it, after a few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    make_demo_data(tmp_path / "demo-data", DemoSpec(samples=64, shards=8))
    flags = "--config configs/runs/demo.yaml --train-data demo-data/train/*.tar --epochs 1 --batch-size 16 --name demo"
    outcome = run_here([*flags.split(), "--logs", "logs", "--workers", "0", "--warmup", "2", "--save-most-recent"])
    assert outcome.code == 0, outcome.text
    return tmp_path


def test_the_readmes_lines_classify_an_image_with_open_clip(trained: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]], cwd=trained, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    probabilities = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert len(probabilities) == 4
    assert sum(probabilities.values()) == pytest.approx(1.0, abs=0.01)


def test_open_clip_computes_the_features_that_we_do(trained: Path) -> None:
    checkpoint = str(trained / "logs/demo/checkpoints/epoch_1.pt")
    open_clip.add_model_config(str(REPOSITORY / "configs/models"))
    theirs = open_clip.create_model("demo-resnet", pretrained=checkpoint).eval()
    ours = create_model("demo-resnet", pretrained=checkpoint).model.eval()
    images, texts = torch.randn(2, 3, 64, 64), open_clip.get_tokenizer("demo-resnet")(["a red circle", "two stars"])
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.encode_text(texts), theirs.encode_text(texts), atol=1e-5, rtol=1e-5)
