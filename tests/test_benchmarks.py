"""The benchmark measures what it says: alternating arms, recorded caption lengths, and a gate before any number."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.batches import caption_lengths, caption_tokens, make_batches
from benchmarks.parity import check_parity
from benchmarks.timing import Arm, alternate, speed_ratio, spread
from benchmarks.train_step import main
from benchmarks.train_step_arms import ArmSettings, ClipyardArm, use_open_clip_checkout
from models.factory import create_model
from training.data.batch import DeviceBatch

CPU = torch.device("cpu")


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


def test_the_ratio_is_above_one_when_we_are_faster():
    ratio = speed_ratio([[10.0, 10.0], [10.0, 10.0]], [[20.0, 20.0], [20.0, 20.0]])
    assert tuple(ratio) == (2.0, 2.0, 2.0)


def test_the_interval_of_the_ratio_covers_blocks_that_disagree():
    ratio = speed_ratio([[10.0], [10.0], [10.0], [10.0]], [[10.0], [11.0], [12.0], [13.0]])
    assert ratio.low < 1.1 < ratio.high


def test_one_step_has_no_spread():
    with pytest.raises(ValueError, match="1 counted steps have no spread: pass --blocks and --block-steps"):
        spread([[1.0]])


def test_captions_are_as_long_as_recorded_alt_texts():
    generator = torch.Generator().manual_seed(0)
    lengths = caption_lengths(4096, context_length=77, generator=generator)
    texts = caption_tokens(lengths, context_length=77, generator=generator)
    assert lengths.double().mean().item() == pytest.approx(15.49, abs=0.6)
    assert torch.equal((texts != 0).sum(dim=1), lengths)
    assert torch.equal(texts.argmax(dim=1), lengths - 1)


def test_full_length_captions_fill_the_context():
    (batch,) = make_batches(1, batch_size=3, image_size=(4, 4), context_length=9, full_length=True, seed=0)
    assert (batch.texts != 0).all()


def _tiny_batch() -> DeviceBatch:
    built = create_model("demo-vit", device="meta")
    (batch,) = make_batches(
        1,
        batch_size=4,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    return DeviceBatch(batch.images.float() / 255, batch.texts)


def test_the_gate_refuses_arms_that_compute_something_else():
    settings = ArmSettings(model="demo-vit", precision="fp32", device=CPU)
    torch.manual_seed(0)
    ours, theirs = ClipyardArm(settings), ClipyardArm(settings)
    with pytest.raises(RuntimeError, match=r"gradient of \S+ differs by"):
        check_parity(ours, theirs, [_tiny_batch()], precision="fp32")


def test_the_gate_refuses_losses_that_drift_apart():
    settings = ArmSettings(model="demo-vit", precision="fp32", device=CPU)
    ours, theirs = ClipyardArm(settings), ClipyardArm(ArmSettings("demo-vit", "fp32", CPU, lr=5e-3))
    theirs.model.load_state_dict(ours.model.state_dict())
    with pytest.raises(RuntimeError, match="losses differ by"):
        check_parity(ours, theirs, [_tiny_batch()] * 3, precision="fp32")


def test_a_checkout_without_open_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no open_clip package under .*: pass --open-clip-path CHECKOUT"):
        use_open_clip_checkout(tmp_path)


def test_a_run_writes_ratio_memory_and_what_it_was_measured_on(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--model=demo-vit", "--batch-size=4", "--device=cpu", "--blocks=2", "--batches=1", f"--out={out}"]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert result["parity"]["loss_difference"] <= 1e-5
    assert result["ratio"]["low"] <= result["ratio"]["value"] <= result["ratio"]["high"]
    assert all(result["memory"][arm]["peak_gib"] > 0.1 for arm in ("clipyard", "open_clip"))
    assert result["run"]["versions"]["torch"] == torch.__version__.split("+")[0]
