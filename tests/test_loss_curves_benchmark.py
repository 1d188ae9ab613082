"""Loss curves of everything on and everything off: what differs is rounding, and what is not rounding is seen."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.curve_gradients import is_as_near
from benchmarks.curve_picture import Curve, Panel, draw
from benchmarks.loss_curves import (
    NOISE,
    OFF,
    ON,
    OPEN_CLIP,
    PAGE,
    RESULTS,
    PlainSoftmaxLoss,
    compare,
    draw_data,
    main,
    make_order,
    report_of_results,
    statement,
)
from benchmarks.scale_report import fill
from models.factory import create_model
from tests.factories import write_tiny_model
from training.config import LossConfig
from training.losses.build import build_loss

TINY = ("--device=cpu", "--steps=3", "--batch-size=8", "--samples=16", "--warmup=2", "--noise-runs=1", "--compile=off")


def _features(seed: int) -> torch.Tensor:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features, dim=-1)


def test_all_arms_start_from_the_same_losses_and_are_drawn(tmp_path):
    out, picture = tmp_path / "curves.json", tmp_path / "curves.svg"
    model = f"--model={write_tiny_model(tmp_path)}"
    code = main([*TINY, model, "--precisions=fp32", f"--out={out}", f"--picture={picture}"])
    part = json.loads(out.read_text())["precisions"]["fp32"]
    assert [*part["losses"]] == [ON, OFF, OPEN_CLIP, f"{NOISE} 1"]
    for curve in part["losses"].values():
        assert curve == pytest.approx(part["losses"][OFF], rel=1e-5)
        assert len(curve) == 3
    assert part["largest"] < 1e-4
    assert code == (0 if part["within_noise"] else 1)
    assert [*part["gradient_error"]] == [ON, OFF, OPEN_CLIP]
    assert all(0 < error["whole"] < 1e-4 and error["cosine"] > 0.99999 for error in part["gradient_error"].values())
    assert "relative distance from fp64, mean of 4 batches: everything on" in part["statement"]
    labels = [text.text for text in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {ON, OFF, OPEN_CLIP, NOISE, "loss, fp32"} <= set(labels)


def test_gradients_further_from_fp64_than_the_rivals_rounding_are_no_rounding():
    rival = {"image": 0.014, "text": 0.014, "whole": 0.014, "cosine": 0.9999}
    assert is_as_near({ON: rival, OPEN_CLIP: rival}, ours=ON, rival=OPEN_CLIP)
    assert not is_as_near({ON: rival | {"text": 0.03}, OPEN_CLIP: rival}, ours=ON, rival=OPEN_CLIP)


def test_another_loss_is_no_noise(tmp_path, monkeypatch, capsys):
    right = PlainSoftmaxLoss._compare
    monkeypatch.setattr(PlainSoftmaxLoss, "_compare", lambda *arguments: 1.01 * right(*arguments))
    files = (
        f"--model={write_tiny_model(tmp_path)}",
        f"--out={tmp_path / 'curves.json'}",
        f"--picture={tmp_path / 'curves.svg'}",
    )
    assert main([*TINY, "--precisions=fp32", *files]) == 1
    assert "NOT identical within noise" in capsys.readouterr().out


def test_the_loss_written_out_is_that_of_a_run():
    images, texts, scale = _features(0), _features(1), torch.tensor(14.0)
    plain = PlainSoftmaxLoss()(images, texts, scale, None)
    assert plain.item() == pytest.approx(build_loss(LossConfig())(images, texts, scale, None).item(), rel=1e-6)


def test_the_band_is_what_runs_of_off_differ_by():
    losses = {ON: [1.0, 1.02], OFF: [1.0, 1.0], OPEN_CLIP: [1.0, 1.5], f"{NOISE} 1": [1.0, 1.01]}
    comparison = compare(losses | {f"{NOISE} 2": [1.0, 0.98]})
    assert comparison.largest == pytest.approx(0.02)
    assert comparison.band_largest == pytest.approx(0.03)  # of the two orders, not of 'off'
    assert comparison.open_clip_largest == pytest.approx(0.5)
    assert statement("fp32", comparison).endswith("): identical within noise")
    assert not compare(losses | {ON: [1.0, 1.2]}).within_noise
    assert compare(losses | {ON: [1.0, 1.2]}, {OFF: [1.0, 1.3]}).within_noise  # where the precision moves it as far


def test_every_epoch_has_every_sample_in_another_order():
    first, second = torch.stack(list(make_order(8, steps=4, batch_size=4, seed=0))).view(2, 8)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(8))
    assert first.tolist() != second.tolist()


def test_too_few_samples_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="7 samples fill no batch of 8: raise --samples or lower --batch-size"):
        next(make_order(7, steps=1, batch_size=8, seed=0))


def test_pictures_and_captions_are_those_of_the_demo_set():
    data = draw_data(create_model("demo-vit", device="meta"), samples=3, seed=0)
    assert data.images.shape == (3, 3, 64, 64)
    assert data.images.dtype == torch.uint8
    assert data.texts.shape == (3, 32)
    assert len({tuple(row) for row in data.texts.tolist()}) == 3


def test_values_that_a_logarithm_does_not_have_leave_a_gap():
    panel = Panel("p", [Curve("c", "red", [1e-3, 0.0, 1e-2, 1e-1])], log=True)
    picture = ElementTree.fromstring(draw([[panel]], legend={}, axis="step"))
    namespace = "{http://www.w3.org/2000/svg}"
    lines = [path for path in picture.iter(f"{namespace}path") if path.get("stroke") == "red"]
    assert [line.get("d", "").count("L") for line in lines] == [0, 1]


def test_the_page_holds_the_results():
    text = PAGE.read_text()
    assert fill(text, {"loss_curves": report_of_results(RESULTS)}) == text
