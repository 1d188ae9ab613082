"""Settings of speed, from the flag to what a run does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import Outcome
from tests.end_to_end.host_waits import HostWaits, watch_steps
from training import assembly
from training.resilience.exit_codes import BAD_USAGE

FLAGS = (
    "--precision fp32 --device cpu --dataset-type synthetic --train-num-samples 24 --batch-size 4 --workers 0 "
    "--epochs 1 --logs none --lr 1e-3"
)
COMMON = FLAGS.split()

Run = Callable[[Sequence[str]], Outcome]


def test_a_run_computes_attention_with_the_kernel_of_the_flag_and_says_so(run_here: Run, tiny_model: str) -> None:
    done = run_here([*COMMON, "--model", tiny_model, "--attention-kernel", "math"])
    assert done.code == 0, done.text
    assert "Attention: math for 4 sequences of 5 image tokens, 2 heads of 16, float32." in done.text
    refused = run_here([*COMMON, "--model", tiny_model, "--attention-kernel", "cudnn"])
    assert refused.code != 0
    assert "--attention-kernel cudnn cannot compute" in refused.text
    assert "Train Epoch" not in refused.text
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_named_kernel_is_tried_at_the_shapes_of_all_phases(run_here: Run, tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "phases.yaml").write_text("- {until_samples: 8, image_size: 16}\n- {batch_size: 2}\n")
    flags = ["--attention-kernel", "math", "--phases", str(tmp_path / "phases.yaml"), "--logs", str(tmp_path / "logs")]
    done = run_here([*COMMON, "--model", tiny_model, *flags])
    assert done.code == 0, done.text
    calls = (
        "4 sequences of 2 image tokens, 2 heads of 16, float32; 2 sequences of 5 image tokens, 2 heads of 16, float32."
    )
    assert f"Attention: math for {calls}" in done.text


def test_a_phase_whose_images_the_model_does_not_compute_is_named_in_one_line(
    run_here: Run, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("Input height (32) should be divisible by window size")

    monkeypatch.setattr(assembly, "attention_calls", fail)
    refused = run_here([*COMMON, "--model", tiny_model, "--attention-kernel", "math"])
    assert refused.code == BAD_USAGE
    assert "does not compute images of 32 x 32, the size of phase 1: Input height (32)" in refused.text
    assert "Traceback" not in refused.text


def test_fp8_on_a_cpu_is_refused_in_one_line(run_here: Run, tiny_model: str) -> None:
    flags = [*COMMON, "--model", tiny_model, "--precision", "amp_bf16", "--fp8", "rowwise"]
    refused = run_here(flags)
    assert refused.code != 0
    assert "--fp8 rowwise needs a GPU with fp8 products, and the device is cpu" in refused.text
    assert "Traceback" not in refused.text


def test_fp8_is_told_how_long_the_captions_of_a_phase_are(
    run_here: Run, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, bool]] = []

    def note(blocks: object, recipe: str, *, batch_size: int, text_length: int, **others: Any) -> None:
        told.append((batch_size, text_length, others["will_be_compiled"]))

    monkeypatch.setattr(assembly, "use_fp8", note)
    (tmp_path / "phases.yaml").write_text("- {until_samples: 8, text_length: 6}\n- {batch_size: 2}\n")
    flags = ["--precision", "amp_bf16", "--fp8", "rowwise", "--phases", str(tmp_path / "phases.yaml")]
    done = run_here([*COMMON, "--model", tiny_model, *flags, "--logs", str(tmp_path / "logs")])
    assert done.code == 0, done.text
    assert told == [(4, 6, False), (2, 16, False)]


def test_a_run_collects_garbage_after_every_nth_step_and_not_in_between(run_here: Run, tiny_model: str) -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and gc.get_freeze_count() > 0:  # within the loop
            collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        done = run_here([*COMMON, "--model", tiny_model, "--gc-every-n-steps", "2"])
    finally:
        gc.callbacks.remove(note)
    assert done.code == 0, done.text
    assert collected == [2] * 6  # after steps 2, 3 (the first ones), 4, 6, and the evaluations before and behind them
    assert gc.isenabled()


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_between_log_points_the_host_never_waits_for_the_device(
    run_here: Run, tiny_model: str, monkeypatch: pytest.MonkeyPatch, accum_freq: int
) -> None:
    waits = HostWaits()
    watch_steps(monkeypatch, begin=waits.__enter__, end=lambda: waits.__exit__(None, None, None))
    settings = "--precision amp_bf16 --train-num-samples 56 --grad-clip-norm 1 --telemetry-every-n-steps 0"
    flags = [*COMMON, *settings.split(), "--model", tiny_model, "--force-patch-dropout", "0.5"]
    if accum_freq == 2:
        flags += ["--accum-freq", "2", "--batch-size", "2"]
    done = run_here(flags)
    assert done.code == 0, done.text
    assert waits.operations > 1000
    assert waits.seen == []


@pytest.mark.parametrize(
    ("name", "wait"),
    [
        ("item", lambda x: x.sum().item()),
        ("bool", lambda x: bool(x.isfinite().all())),
        ("mask", lambda x: x[x > 0]),
        ("nonzero", lambda x: x.nonzero()),
        ("equal", lambda x: torch.equal(x, x)),
        ("cpu", lambda x: x.cpu()),
        ("to", lambda x: x.to("cpu", copy=True)),
        ("tolist", lambda x: x.tolist()),
        ("numpy", lambda x: x.numpy()),
        ("unique", lambda x: x.unique()),
        ("consecutive", lambda x: x.unique_consecutive()),
        ("bincount", lambda x: x.int().bincount()),
        ("tensor", lambda x: torch.tensor([1.0], device=x.device)),
    ],
)
def test_what_would_wait_is_seen(name: str, wait: Callable[[torch.Tensor], object]) -> None:
    with HostWaits() as waits:
        wait(torch.ones(3))
    assert waits.seen, name
