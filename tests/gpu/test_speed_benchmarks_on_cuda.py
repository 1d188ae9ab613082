"""What the benchmarks of speed read from a real device: kernels by category, times by events."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import profile_step
from benchmarks.end_to_end_arms import measure
from tests.factories import write_tiny_model

pytestmark = pytest.mark.gpu


def test_every_kernel_of_a_step_has_a_category(device, tmp_path):
    out = tmp_path / "profile.json"
    flags = [f"--model={write_tiny_model(tmp_path)}", "--batch-size=16", "--steps=2", "--warmup-steps=2"]
    assert profile_step.main([*flags, "--device=cuda", f"--out={out}"]) == 0
    for name, arm in json.loads(out.read_text())["arms"].items():
        assert arm["categories"]["other"]["share"] < 0.05, (name, arm["other"])
        assert arm["categories"]["matrix products"]["ms"] > 0
        assert 0 < arm["operations_ms"] <= arm["wall_ms"] * 1.05


def test_waiting_for_data_is_time_in_which_the_device_has_no_step(device):
    work = torch.randn(2048, 2048, device=device)

    def step(_: object) -> None:
        for _ in range(20):
            work @ work

    block = measure(step, iter([None] * 6), steps=4, rewarm=2, device=device)  # type: ignore[arg-type]
    assert len(block["step_ms"]) == len(block["wait_ms"]) == 4
    assert all(0 <= wait < step_ms for wait, step_ms in zip(block["wait_ms"], block["step_ms"], strict=True))
