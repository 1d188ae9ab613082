"""The benchmark measures what it says: alternating arms, recorded caption lengths, and gates around every number."""

from __future__ import annotations

import json
import time

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from benchmarks.batches import caption_lengths, caption_tokens, make_batches, real_lengths
from benchmarks.memory import held_gib
from benchmarks.mfu import Ceiling, data_sheet_mfu, measure_ceiling, utilisation
from benchmarks.parity import check_gradients, check_losses, compare_curves
from benchmarks.timing import Arm, Deadline, alternate, speed_ratio, spread
from benchmarks.train_step import main, text_tokens
from benchmarks.train_step_arms import (
    ArmSettings,
    ClipyardArm,
    OpenClipArm,
    drawing_on,
    without_stochastic_depth,
)
from benchmarks.training_flops import TrainingFlops
from models.factory import create_model
from models.packing import PackedTexts

CPU = torch.device("cpu")
SETTINGS = ArmSettings(model="demo-vit", precision="fp32", device=CPU)


def test_arms_alternate_in_the_order_a_b_b_a():
    calls: list[str] = []
    arms = {name: Arm(lambda number: number, lambda _, name=name: calls.append(name)) for name in "AB"}
    alternate(arms, blocks=2, block_steps=1, rewarm_steps=0, device=CPU)
    assert calls == ["A", "B", "B", "A"]


def test_steps_that_warm_a_block_up_are_not_counted():
    numbers: list[int] = []
    arms = {"A": Arm(lambda number: number, numbers.append)}
    times = alternate(arms, blocks=2, block_steps=3, rewarm_steps=2, device=CPU)["A"]
    assert [len(block) for block in times.wall] == [3, 3]
    assert numbers == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5]


def test_a_late_measurement_ends_with_the_least_blocks_and_no_sooner():
    over = Deadline(0.0, started=time.monotonic() - 1)
    arms = {"A": Arm(lambda number: number, lambda _: None)}
    times = alternate(arms, blocks=9, block_steps=2, rewarm_steps=0, device=CPU, least_blocks=3, deadline=over)
    assert len(times["A"].wall) == 3


def test_every_round_from_the_second_on_is_kept_for_when_the_process_is_ended():
    kept: list[int] = []
    arms = {name: Arm(lambda number: number, lambda _: None) for name in "AB"}
    keep = lambda times: kept.append(len(times["B"].wall))  # noqa: E731 - one line of its own
    alternate(arms, blocks=4, block_steps=1, rewarm_steps=0, device=CPU, keep=keep)
    assert kept == [2, 3, 4]


def test_without_a_limit_all_blocks_are_measured():
    arms = {"A": Arm(lambda number: number, lambda _: None)}
    unlimited = Deadline(None, started=0.0)
    assert len(alternate(arms, blocks=4, block_steps=1, rewarm_steps=0, device=CPU, deadline=unlimited)["A"].wall) == 4


def test_the_ratio_is_above_one_when_we_are_faster():
    ratio = speed_ratio([[10.0, 10.0], [10.0, 10.0]], [[20.0, 20.0], [20.0, 20.0]])
    assert tuple(ratio) == (2.0, 2.0, 2.0)


def test_the_interval_of_the_ratio_covers_blocks_that_disagree():
    ratio = speed_ratio([[10.0], [10.0], [10.0], [10.0]], [[10.0], [11.0], [12.0], [13.0]])
    assert ratio.low < 1.1 < ratio.high


def test_one_step_has_no_spread():
    with pytest.raises(ValueError, match="1 counted steps have no spread: pass --blocks and --block-steps"):
        spread([[1.0]])


@pytest.mark.parametrize("count", [32, 4096])
def test_captions_are_as_long_as_recorded_alt_texts_in_small_batches_too(count):
    generator = torch.Generator().manual_seed(0)
    lengths = caption_lengths(count, context_length=77, generator=generator)
    texts = caption_tokens(lengths, context_length=77, generator=generator)
    assert lengths.double().mean().item() == pytest.approx(15.49, abs=0.6)
    assert torch.equal((texts != 0).sum(dim=1), lengths)
    assert torch.equal(texts.argmax(dim=1), lengths - 1)


def test_full_length_captions_fill_the_context():
    (batch,) = make_batches(1, batch_size=3, image_size=(4, 4), context_length=9, full_length=True, seed=0)
    assert (batch.texts != 0).all()


def _tiny_batch():
    built = create_model("demo-vit", device="meta")
    (batch,) = make_batches(
        1,
        batch_size=8,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    return batch


def test_our_arm_is_fed_packed_captions_and_openclips_padded_ones():
    batch = _tiny_batch()
    (ours,) = ClipyardArm(SETTINGS).prepare([batch])
    (theirs,) = OpenClipArm(SETTINGS).prepare([batch])
    assert isinstance(ours.texts, PackedTexts)
    assert ours.texts.lengths.tolist() == real_lengths([batch])
    assert text_tokens(ours) < 1.1 * sum(real_lengths([batch])) < text_tokens(theirs) == batch.texts.numel()
    assert torch.equal(ours.images, theirs.images)


def test_flags_of_a_run_reach_our_arm():
    arm = ClipyardArm(SETTINGS, flags=["--text-packing=off", "--channels-last=off"])
    (prepared,) = arm.prepare([_tiny_batch()])
    assert isinstance(prepared.texts, torch.Tensor)
    assert arm.config.engine.channels_last == "off"
    assert arm.config.resilience.guard == "on"


def test_the_gate_refuses_arms_that_compute_something_else():
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"gradient of \S+ differs by"):
        check_gradients(ClipyardArm(SETTINGS), ClipyardArm(SETTINGS), _tiny_batch())


def test_the_gate_refuses_an_arm_without_some_of_the_gradients():
    ours, theirs = ClipyardArm(SETTINGS), ClipyardArm(SETTINGS)
    theirs.model.logit_scale.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"only one arm has a gradient for \['logit_scale'\]"):
        check_gradients(ours, theirs, _tiny_batch())


def test_the_gate_refuses_first_losses_that_differ():
    with pytest.raises(RuntimeError, match=r"losses differ by 1.00e-02 \(tolerance 1e-05\).*no timing counts"):
        check_losses([1.01], [1.0], precision="fp32", gradient_difference=None)
    assert check_losses([1.01], [1.0], precision="amp_bf16", gradient_difference=None).loss_tolerance == 2e-2


def test_losses_of_all_steps_must_agree_and_no_step_may_be_skipped():
    assert compare_curves([1.0, 2.0], [1.0, 2.0], precision="fp32", skipped_steps=0).holds
    assert not compare_curves([1.0, 2.0], [1.0, 2.0], precision="fp32", skipped_steps=1).holds
    assert not compare_curves([1.0, 2.1], [1.0, 2.0], precision="amp_bf16", skipped_steps=0).holds
    assert not compare_curves([1.0, float("nan")], [1.0, 2.0], precision="fp32", skipped_steps=0).holds


def test_mfu_is_useful_flops_over_the_measured_ceiling():
    flops = TrainingFlops(useful=2e9, computed=2.1e9, padded=3e9)
    used = utilisation(flops, samples_per_s=250, ceiling=Ceiling(1.0, 8192, "bfloat16"))
    assert tuple(used) == pytest.approx((0.5, 0.75))
    rate = {"samples_per_s": 989e12 / 4e9, "dtype": torch.bfloat16}
    assert data_sheet_mfu(flops, gpu="NVIDIA H200", **rate) == pytest.approx(0.5)
    assert data_sheet_mfu(flops, gpu="NVIDIA A100", **rate) is None


def test_the_ceiling_is_a_rate_of_matrix_products():
    slowest = time.monotonic()
    ceiling = measure_ceiling(CPU, torch.float32, sizes=(192,), repeats=5)
    slowest = time.monotonic() - slowest
    assert ceiling[1:] == (192, "float32")
    assert ceiling.tflops > 2 * 192**3 / slowest / 1e12


def test_an_arm_holds_weights_gradients_and_moments():
    model = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert held_gib(model, optimizer, CPU) * 2**30 == 4 * 256**2
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    assert held_gib(model, optimizer, CPU) * 2**30 == pytest.approx(4 * 4 * 256**2, rel=1e-4)


def test_both_arms_keep_every_block():
    model = nn.Sequential(DropPath(0.9)).train()
    without_stochastic_depth(model)
    assert torch.equal(model(torch.ones(64, 2)), torch.ones(64, 2))


def test_weights_drawn_on_a_device_have_the_distribution_that_was_asked_for():
    with drawing_on(CPU):
        weights = nn.init.trunc_normal_(torch.empty(512, 512), std=0.02)
        uniform = torch.empty(512, 512).uniform_(1.0, 3.0)
    with drawing_on(torch.device("meta")), pytest.raises(NotImplementedError, match="meta"):
        torch.empty(512, 512).normal_()  # drawn where there are no numbers to copy
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert (uniform.min().item(), uniform.max().item()) == pytest.approx((1.0, 3.0), abs=1e-3)


TINY = ("--model=demo-vit", "--batch-size=4", "--device=cpu", "--blocks=2", "--batches=1")


def test_a_run_writes_ratio_utilisation_and_what_it_was_measured_on(tmp_path):
    out = tmp_path / "result.json"
    assert main([*TINY, "--no-memory", f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    comparison = result["comparisons"]["open_clip"]
    assert comparison["parity"]["loss_difference"] <= 1e-5
    assert comparison["losses"]["holds"]
    assert comparison["losses"]["steps"] == 2 + 1 + 2  # gate, warm-up, blocks
    assert comparison["ratio"]["low"] <= comparison["ratio"]["value"] <= comparison["ratio"]["high"]
    assert result["text_tokens"]["real"] <= result["text_tokens"]["computed"] < result["text_tokens"]["padded"]
    ours, flops = comparison["arms"]["clipyard"], result["useful_gflops_per_sample"] * 1e9
    assert ours["mfu_useful"] == pytest.approx(flops * ours["samples_per_s"] / (result["ceiling_tflops"] * 1e12))
    assert ours["equivalent"] > ours["mfu_useful"]
    assert result["run"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_rival_for_whom_no_time_is_left_is_not_begun(tmp_path):
    out = tmp_path / "result.json"
    assert main([*TINY, "--no-memory", f"--out={out}", "--time-limit-s=0", "--rivals", "open_clip"]) == 0
    assert json.loads(out.read_text())["comparisons"]["open_clip"] == {"unfinished": "no time was left for it"}


def test_without_a_rival_ours_is_measured_alone_and_its_memory_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "result.json"
    assert main([*TINY, f"--out={out}", "--rivals"]) == 0
    result = json.loads(out.read_text())
    assert result["alone"]["arms"]["clipyard"]["samples_per_s"] > 0
    assert result["memory"]["clipyard"]["peak_gib"] > result["memory"]["clipyard"]["resident_before_steps_gib"] > 0.1


def test_a_rival_that_does_not_fit_is_recorded_and_ours_is_measured_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(OpenClipArm, "step", fail)
    out = tmp_path / "result.json"
    assert main([*TINY, "--no-memory", f"--out={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["comparisons"]["open_clip"] == {"out_of_memory": {"open_clip": "CUDA out of memory"}}
    assert result["alone"]["arms"]["clipyard"]["steps"] == 2


def test_a_comparison_whose_losses_drift_apart_is_void(tmp_path, monkeypatch):
    plain = OpenClipArm.step
    monkeypatch.setattr(OpenClipArm, "step", lambda arm, batch: plain(arm, batch) * 1.001)
    monkeypatch.setattr("benchmarks.parity.LOSS_TOLERANCE", {"fp32": 1e-2})
    out = tmp_path / "result.json"
    assert main([*TINY, "--no-memory", f"--out={out}"]) == 1
    comparison = json.loads(out.read_text())["comparisons"]["open_clip"]
    assert comparison["void"].startswith("losses drift apart")
    assert "ratio" not in comparison
