"""The benchmark of the step on a GPU: events, memory by the allocator's account, a ceiling in bf16."""

from __future__ import annotations

import json

import pytest

from benchmarks.train_step import main

pytestmark = pytest.mark.gpu


def test_both_arms_compiled_pass_the_gates_on_cuda(tmp_path):
    out = tmp_path / "result.json"
    words = ["--model=demo-vit", "--batch-size=32", "--device=cuda", "--precision=amp_bf16", "--blocks=2"]
    steps = ["--block-steps=2", "--warmup-steps=1", "--least-steps=4", "--batches=2", "--rivals", "open_clip_tuned"]
    assert main([*words, *steps, f"--out={out}", "--", "--torchcompile"]) == 0
    assert "ratio" in json.loads(out.read_text())["comparisons"]["open_clip_tuned"]


def test_both_arms_are_timed_on_cuda_and_agree(tmp_path):
    out = tmp_path / "result.json"
    words = ["--model=demo-vit", "--batch-size=32", "--device=cuda", "--precision=amp_bf16", "--blocks=2"]
    steps = ["--block-steps=3", "--warmup-steps=2", "--rewarm-steps=1", "--least-steps=6", "--batches=2"]
    assert main([*words, *steps, f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    comparison = result["comparisons"]["open_clip"]
    assert comparison["parity"]["gradient_difference"] <= 1e-4
    assert comparison["parity"]["timed_form"]["ours"]["cosine"] > 0.999
    assert all(arm["steps"] == 6 and 0 < arm["peak_gib"] < 8 for arm in comparison["arms"].values())
    assert result["ceiling"]["dtype"] == "bfloat16"
    assert 1 < result["ceiling_tflops"] < 5000
