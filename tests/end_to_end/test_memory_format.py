"""A run whose convolutions lie in NHWC memory: its checkpoints are those of any other, and it goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import TINY_MODEL, Outcome

FLAGS = (
    "--precision fp32 --device cpu --dataset-type synthetic --train-num-samples 24 --batch-size 4 --workers 0 "
    "--epochs 1 --lr 1e-3 --save-every-n-steps 3 --keep-checkpoints 5 --report-to none"
)

Run = Callable[[Sequence[str]], Outcome]


@pytest.fixture
def convnext(tmp_path: Path) -> str:
    vision = {"timm_model_name": "test_convnext", "timm_proj": "linear", "image_size": 32}
    path = tmp_path / "convnext.json"
    path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": vision}))
    return str(path)


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint, as another program reads them."""
    (directory,) = (run / "checkpoints").glob(f"step_*{step:d}")
    found = {}
    for kind in ("model", "optimizer"):
        found |= {f"{kind} {name}": tensor for name, tensor in load_file(directory / f"{kind}.safetensors").items()}
    return found


@pytest.mark.parametrize("opt", ["adamw", "stableadamw"])
def test_a_run_in_another_order_of_memory_goes_on_from_its_checkpoint_bit_for_bit(
    run_here: Run, convnext: str, tmp_path: Path, opt: str
) -> None:
    logs = tmp_path / "logs"
    line = [*FLAGS.split(), "--model", convnext, "--logs", str(logs), "--opt", opt, "--channels-last"]
    whole = run_here([*line, "on", "--name", "whole"])
    assert whole.code == 0, whole.text
    assert "image tower: NHWC memory" in whole.text
    (start,) = (logs / "whole" / "checkpoints").glob("step_*3")
    for choice in ("on", "off"):
        done = run_here([*line, choice, "--name", choice, "--resume", str(start)])
        assert done.code == 0, done.text
    expected = state(logs / "whole", 6)
    torch.testing.assert_close(state(logs / "on", 6), expected, rtol=0, atol=0)
    # Another order of sums, and the steps of weights whose gradient is nearly zero.
    torch.testing.assert_close(state(logs / "off", 6), expected, rtol=1e-2, atol=2e-3)
