"""The stability benchmarks: faults where they are planned, and costs that add up."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from benchmarks import guard_cost, stability_curves
from benchmarks.stability_curves import (
    NAN_PIXEL,
    SECOND_MOMENT,
    WRONG_CAPTIONS,
    Curve,
    FaultyStep,
    NumberedBatch,
    draw,
    summarize,
)
from tests.tiny_clip import tiny_batch, tiny_clip
from training.config import LossConfig, OptimConfig
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision

FAULTS = {3: WRONG_CAPTIONS, 4: SECOND_MOMENT, 5: NAN_PIXEL}


def test_the_cost_of_the_guard_is_given_by_part_and_in_sum(tmp_path):
    out = tmp_path / "cost.json"
    guard_cost.main(
        ["--model=demo-vit", "--batch-size=2", "--blocks=2", "--warmup-steps=1", "--repeats=1", f"--out={out}"]
    )
    share = json.loads(out.read_text())["share"]["wall"]
    parts = share["guard_ms"] + share["telemetry_ms"] + share["checksum_ms"]
    assert share["sum_ms"] == pytest.approx(parts, abs=1e-3)
    assert share["sum_pct"] == pytest.approx(100 * parts / share["step_ms"], abs=1e-2)


def _numbered(number: int) -> NumberedBatch:
    batch = NumberedBatch(*tiny_batch(4, seed=number))
    batch.number = number
    return batch


def test_faults_happen_to_the_planned_batches_only():
    model = tiny_clip()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6))
    step = FaultyStep(
        model=model,
        loss=build_loss(LossConfig()),
        optimizer=optimizer,
        precision=build_precision("fp32", torch.device("cpu")),
    )
    step.faults = FAULTS
    moments, changed = [], []
    for number in range(6):
        batch = _numbered(number)
        step([batch], lr=1e-3)
        moments.append(float(optimizer.state[model.visual.proj.weight]["exp_avg_sq"].mean()))
        plain = tiny_batch(4, seed=number)
        changed.append((not torch.equal(batch.texts, plain.texts), not torch.equal(batch.images, plain.images)))
    assert changed == [(False, False)] * 3 + [(True, False), (False, False), (False, True)]
    assert moments[4] < 0.6 * moments[3]


def test_what_is_not_finite_is_counted_and_no_part_of_a_median():
    loss = dict.fromkeys(range(1, 301), 2.0) | dict.fromkeys(range(301, 401), math.nan)
    summary = summarize(Curve(loss, {}, {}, [{"event": "skipped", "step": 7}], 1), {150: SECOND_MOMENT})
    assert summary["median_loss_in_the_100_steps_after_it"] == 2.0
    assert summary["median_loss_of_the_last_50_steps"] == "not finite"
    assert summary["last_step_with_a_finite_loss"] == 300
    assert summary["events"] == {"skipped": [7]}


def test_drawing_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"drawing needs matplotlib: pip install 'clipyard\[benchmarks\]'"):
        draw({}, faults={}, path=tmp_path / "curves.png")


def test_every_arm_has_a_colour():
    assert stability_curves.COLORS.keys() == stability_curves.ARMS.keys()
