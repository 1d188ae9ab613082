"""What a ratio must have passed: the OpenCLIP that was asked for, and in bf16, too, programs that compute the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from benchmarks import end_to_end, loss_curves, profile_step, train_step, train_step_all
from benchmarks.batches import HostBatch, make_batches
from benchmarks.gradient_error import Distance, distance, exact_pass
from benchmarks.open_clip_checkout import open_clip_label, use_open_clip_checkout
from benchmarks.parity import TimedParity, check_timed_form, refuse_distance
from benchmarks.provenance import ROOT, describe_run
from benchmarks.train_step_arms import ArmSettings, ClipyardArm, OpenClipArm, Tuning
from models.factory import create_model

CPU = torch.device("cpu")
SETTINGS = ArmSettings(model="demo-vit", precision="amp_bf16", device=CPU)
PROGRAMS = (train_step, train_step_all, profile_step, loss_curves, end_to_end)


@pytest.fixture
def checkout(tmp_path):
    """OpenCLIP's package as it is installed, with a version of its own."""
    copied = tmp_path / "checkout" / "src" / "open_clip"
    shutil.copytree(Path(open_clip.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (copied / "version.py").write_text('__version__ = "9.8.7"\n')
    return copied.parents[1]


def test_the_checkout_that_is_named_is_the_one_that_is_measured(checkout, tmp_path):
    out = tmp_path / "result.json"
    words = ("--model=demo-vit", "--batch-size=4", "--device=cpu", "--blocks=2", "--batches=1", "--no-memory")
    command = (sys.executable, "-m", "benchmarks.train_step", f"--open-clip-path={checkout}", *words, f"--out={out}")
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=200)
    run = json.loads(out.read_text())["run"]
    assert run["open_clip"] == {
        "version": "9.8.7",
        "installed": False,
        "commit": None,
        "uncommitted_changes": None,
    }
    assert open_clip_label(run) == "9.8.7-checkout"
    assert open_clip_label(describe_run(CPU)) == open_clip.__version__


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_program_measures_another_open_clip_than_the_one_named(program, checkout):
    words = [f"--open-clip-path={checkout}"]
    with pytest.raises(RuntimeError, match=r"open_clip is that of .*, not of --open-clip-path .*PYTHONPATH="):
        program.main(words)


def test_a_checkout_without_open_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no open_clip package under .*: pass --open-clip-path CHECKOUT"):
        use_open_clip_checkout(tmp_path, may_restart=False)


def _batch(size: int = 16) -> HostBatch:
    built = create_model("demo-vit", device="meta")
    (batch,) = make_batches(
        1,
        batch_size=size,
        image_size=built.preprocess.size,
        context_length=built.config.text_cfg.context_length,
        full_length=False,
        seed=0,
    )
    return batch


def _arms(**tuning: bool) -> tuple[ClipyardArm, OpenClipArm]:
    torch.manual_seed(0)
    ours, theirs = ClipyardArm(SETTINGS), OpenClipArm(SETTINGS, tuning=Tuning(**tuning))
    theirs.model.load_state_dict(ours.model.state_dict())
    return ours, theirs


def _check(ours: ClipyardArm, theirs: OpenClipArm, batch: HostBatch, other: HostBatch | None = None) -> TimedParity:
    return check_timed_form(ours, theirs, ours.prepare([batch])[0], theirs.prepare([other or batch])[0])


def test_in_bf16_ours_is_as_near_to_the_exact_gradient_as_the_rival_and_nothing_is_left_behind():
    ours, theirs = _arms()
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    parity = _check(ours, theirs, _batch())
    distances = (parity.ours, parity.theirs)
    assert all(1e-3 < one.whole < 0.05 and one.cosine > 0.9999 for one in distances)  # it was bf16, and it was right
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    assert all(value.grad is None for arm in (ours, theirs) for value in arm.model.parameters())


def test_other_weights_are_refused():
    ours, theirs = _arms()
    theirs.model.load_state_dict(OpenClipArm(SETTINGS).model.state_dict())
    with pytest.raises(RuntimeError, match=r"timed program: image gradient is \S+ from exact, the rival's"):
        _check(ours, theirs, _batch())


def test_shuffled_pairs_are_refused():
    batch = _batch()
    with pytest.raises(RuntimeError, match="timed program"):
        _check(*_arms(), batch, HostBatch(batch.images, batch.texts.roll(1, 0)))


def test_a_text_tower_without_attention_is_refused():
    ours, theirs = _arms()
    attention = ours.model.transformer.resblocks[0].attn.out_proj
    attention.register_forward_hook(lambda _, __, out: out * 0)
    with pytest.raises(RuntimeError, match="timed program: image gradient is"):
        _check(ours, theirs, _batch())


def test_one_wrong_parameter_is_refused_though_its_tower_is_right():
    ours, theirs = _arms()
    ours.model.visual.ln_post.bias.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(RuntimeError, match="gradient of visual.ln_post.bias is .* from exact"):
        _check(ours, theirs, _batch())


def test_a_missing_gradient_is_refused():
    ours, theirs = _arms()
    ours.model.logit_scale.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"ours has other gradients than the exact pass, for one: \['logit_scale'\]"):
        _check(ours, theirs, _batch())


RIGHT = Distance(0.01, 0.01, 0.01, 0.9999)


def test_features_that_point_elsewhere_and_a_rival_that_tells_nothing_are_refused():
    refuse_distance(TimedParity(RIGHT, RIGHT))
    refuse_distance(TimedParity(RIGHT._replace(cosine=0.997), RIGHT._replace(cosine=0.998)))  # bf16 itself is as far
    with pytest.raises(RuntimeError, match=r"cosine of features 0.99800 \(tolerance 0.99900\)"):
        refuse_distance(TimedParity(RIGHT._replace(cosine=0.998), RIGHT))
    with pytest.raises(RuntimeError, match="own text gradient is 4.0e-01 from exact: it tells nothing"):
        refuse_distance(TimedParity(RIGHT, RIGHT._replace(text=0.4)))


def test_the_exact_pass_in_pieces_is_that_of_the_whole_batch(monkeypatch):
    _, theirs = _arms()
    (batch,) = theirs.prepare([_batch()])
    whole = theirs.exact(batch, dtype=torch.float64)
    monkeypatch.setattr("benchmarks.gradient_error.ROWS", 5)
    found = distance(exact_pass(theirs.model, batch, theirs._loss, dtype=torch.float64), whole)
    assert max(found[:3]) < 1e-12


def test_the_compiled_rival_passes_the_gate_and_takes_a_step(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    ours, theirs = _arms(compiled=True)
    batch = _batch(8)
    _check(ours, theirs, batch)
    losses = [arm.step(arm.prepare([batch])[0]).item() for arm in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_result_names_no_folder_of_the_machine(monkeypatch):
    words = ["python", "-m", "benchmarks.train_step", "--out=/home/a b.json", "--results", "/data/results", "-1"]
    monkeypatch.setattr(sys, "orig_argv", words)
    command = describe_run(CPU)["command"]
    assert command == "python -m benchmarks.train_step '--out=a b.json' --results results -1"
