"""Curricula: what a file may say, what a model can go through, what it costs, and that the recipes run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from models.weights import resize_image_positions
from tests.end_to_end.conftest import TINY_MODEL, Outcome
from tests.end_to_end.conftest import run_here as run_here
from tests.factories import write_shards
from training.checkpoint.config_change import check_config_change, remarks
from training.checkpoint.positions import PositionTable, ResizedRows, Resizing
from training.cli import config_values, parse, with_model_defaults
from training.config import Config, ModelConfig
from training.phase_check import check_models
from training.phases import Phases, past_differs, read_phases
from training.plan import TrainPlan
from training.work import Work

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "phases"


def phases_of(tmp_path: Path, text: str, *, model: str = "ViT-B-32") -> Phases:
    path = tmp_path / "phases.yaml"
    path.write_text(text)
    config = with_model_defaults(Config(model=ModelConfig(model=model)))
    config = replace(config, data=replace(config.data, train_data="x.tar"))
    return read_phases(replace(config, schedule=replace(config.schedule, phases=str(path))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("image_size: 3", "must be a list of phases"),
        ("- 3", "phase 1: 3 is no phase: write keys"),
        ("- {image_sise: 3}", r"image_sise is no key \(nearest: image_size\)"),
        ("- {image_size: 3, image_size: 4}", "image_size is there twice"),
        ("- {until_samples: 5}", "phase 1 is the last one"),
        ("- {image_size: 32}\n- {}", "phase 1 has no until_samples"),
        ("- {until_samples: many}\n- {}", "until_samples 'many' must be a whole number of samples"),
        ("- {until_samples: 8}\n- {until_samples: 8}\n- {}", r"8 is not after the end of the phase before \(8\)"),
        ("- {image_size: [32, 32, 32]}", r"image_size \[32, 32, 32\] must be one size in pixels"),
        ("- {patch_dropout: 1}", "patch_dropout 1 must be a share"),
        ("- {batch_size: 0}", "batch_size 0 must be a whole number of at least 1"),
        ("- {text_length: true}", "text_length True must be a whole number"),
        ("- {aug_cfg: 3}", "aug_cfg 3 must be a mapping"),
        ("- {aug_cfg: {scal: 1}}", "phase 1: --aug-cfg scal=1 is not an augmentation key"),
    ],
)
def test_a_file_that_describes_no_phases_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases_of(tmp_path, text)


def test_a_file_that_is_not_there_is_refused() -> None:
    config = Config()
    with pytest.raises(ValueError, match="--phases nowhere cannot be read"):
        read_phases(replace(config, schedule=replace(config.schedule, phases="nowhere")))


def test_what_a_phase_does_not_name_is_as_the_flags_say(tmp_path: Path) -> None:
    phases = phases_of(
        tmp_path, "- {until_samples: 1e3, image_size: 64, aug_cfg: {scale: [0.4, 1]}}\n- {batch_size: 2}"
    )
    small, full = phases.all
    assert (small.begin, small.end, full.begin, full.end) == (0, 1000, 1000, None)
    assert [phases.at(seen).number for seen in (0, 999, 1000)] == [1, 1, 2]
    assert (small.config.model.force_image_size, small.config.data.batch_size) == ((64,), 64)
    assert small.config.image.aug_cfg == {"scale": (0.4, 1)}
    assert (full.config.model.force_image_size, full.config.data.batch_size) == (None, 2)
    assert phases.as_json() == json.loads(json.dumps(phases.as_json()))
    assert Phases(phases.all[1:]).as_json() is None


def test_steps_that_are_too_large_are_refused_and_odd_lengths_said(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, "- {until_samples: 3}\n- {until_samples: 200, batch_size: 4}\n- {}")
    short, unreached = phases.check(samples_per_epoch=64, epochs=2, ranks=1)
    assert short == "Phase 1 has 3 samples, less than one step of 64."
    assert "ends after 128 samples, so phase 3 (from 200) is never reached" in unreached
    with pytest.raises(ValueError, match=r"phase 1: its global batch of 128 .* is more than an epoch of 64"):
        phases.check(samples_per_epoch=64, epochs=2, ranks=2)


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        ("ViT-B-32", "- {until_samples: 9}\n- {image_size: 100}", r"phase 2: image size 100 x 100 .* not divisible"),
        ("ViT-B-32", "- {text_length: 78}", "text_length 78 is more than the context of 77"),
        ("ViT-B-32-no-causal", "- {text_length: 8}", "attention without a causal mask sees the padding"),
        ("RN50", "- {patch_dropout: 0.5}", "the image tower of 'RN50' has no patches to drop"),
        ("convnext_base", "- {patch_dropout: 0.5}", "phase 1: timm model 'convnext_base' does not accept"),
        ("swin_base_patch4_window7_224", "- {until_samples: 9}\n- {image_size: 448}", "phase 2: "),
    ],
)
def test_a_phase_that_contradicts_the_model_is_refused(
    tmp_path: Path, tiny_variants: Callable[[str], str], model: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_models(phases_of(tmp_path, text, model=tiny_variants(model)))


@pytest.fixture
def tiny_variants(tmp_path: Path) -> Callable[[str], str]:
    """A model's name, or the path of one that is not built in."""

    def find(name: str) -> str:
        model = json.loads(json.dumps(TINY_MODEL))
        if name == "ViT-B-32-no-causal":
            model["text_cfg"] |= {"no_causal_mask": True}
        elif name.startswith("swin"):
            model["vision_cfg"] = {"timm_model_name": name, "image_size": 224}
        else:
            return name
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(model))
        return str(path)

    return find


def test_the_flops_of_a_run_are_those_of_its_phases(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, "- {until_samples: 1000, patch_dropout: 0.5, text_length: 16}\n- {}")
    flops = check_models(phases)
    assert flops is not None
    assert flops[1] == pytest.approx(44.33e9, rel=1e-3)  # 3 x 2 x the 7.39 GMAC of OpenCLIP's model profile
    assert 0.3 < flops[0] / flops[1] < 0.5
    first = Work(phases, flops, phases.all[0])
    assert first.read(1500)["exaflops"] == pytest.approx((1000 * flops[0] + 500 * flops[1]) / 1e18)
    assert first.left(500, total=2000) == pytest.approx(500 + 1000 * flops[1] / flops[0])
    assert first.during(phases.all[1]).left(1500, total=2000) == 500
    assert replace(first, flops=None).left(1500, total=2000) == 500


def test_epochs_and_the_end_follow_the_samples_whatever_the_batch() -> None:
    """The step that reaches the samples of an epoch is its last; nothing is counted twice when the batch changes."""
    ends, seen = [], 0
    for batch, until in ((8, 90), (12, 150), (4, 300)):
        plan = TrainPlan(100, 3, 1, batch, log_every_n_steps=1000, log_metric_every_n_steps=1000)
        while seen < until:
            if plan.ends_epoch(seen):
                ends.append((plan.epoch_at(seen), seen + batch))
                assert plan.logs_line(seen)
            seen += batch
    assert ends == [(0, 108), (1, 200), (2, 300)]
    assert (plan.steps_left(seen), plan.epoch_at(seen), plan.steps_left(298)) == (0, 3, 1)


def test_position_embeddings_are_resized_as_open_clip_does_and_second_moments_stay_positive() -> None:
    table = PositionTable("visual.trunk.pos_embed", (1, 2 + 5 * 7, 8), (5, 7), is_computed=False)
    resize = Resizing(table, (1, 2 + 4 * 9, 8), (4, 9))
    weights = torch.randn(1, 2 + 36, 8)
    resized = resize(weights)
    assert resized.shape == table.shape
    torch.testing.assert_close(resized[:, :2], weights[:, :2])
    moments = torch.zeros(1, 2 + 36, 8)
    moments[0, 20] = 1.0
    assert resize(moments).min() >= 0
    square = Resizing(PositionTable("p", (1 + 9, 8), (3, 3), is_computed=False), (1 + 16, 8), (4, 4))
    positions = torch.randn(17, 8)
    torch.testing.assert_close(square(positions), resize_image_positions(positions, grid_size=(3, 3)))
    with pytest.raises(ValueError, match=r"keeps 'p//rows' in the shape \(17,\) .* cannot be resized"):
        ResizedRows(square, {"p//rows": (17,), "p//step": ()})


def test_other_phases_are_refused_at_a_resume_unless_named(tmp_path: Path) -> None:
    old = phases_of(tmp_path, "- {until_samples: 100, image_size: 64}\n- {until_samples: 200}\n- {}")
    train = {"step": 9, "samples_seen": 150, "config": config_values(Config()) | {"phases": old.as_json()}}
    moved = phases_of(tmp_path, "- {until_samples: 100, image_size: 64}\n- {until_samples: 300}\n- {}").as_json()
    rewritten = phases_of(tmp_path, "- {until_samples: 100, image_size: 96}\n- {}").as_json()
    config = Config()
    assert check_config_change(train, config, world_size=1, phases=old.as_json()).as_json() == {}
    with pytest.raises(ValueError, match=r"--allow-config-change phases"):
        check_config_change(train, config, world_size=1, phases=moved)
    named = replace(config, checkpoint=replace(config.checkpoint, allow_config_change=("phases",)))
    for phases, is_past in ((moved, False), (rewritten, True)):
        change = check_config_change(train, named, world_size=1, phases=phases)
        assert past_differs(old.as_json(), phases, 150) == is_past
        assert any("That is past" in line for line in remarks(change, train, named)) == is_past


def test_phases_need_a_place_for_checkpoints_and_data_to_train_on() -> None:
    with pytest.raises(ValueError, match="--phases p with --logs none: a phase goes on from the checkpoint"):
        parse(["--train-data=x.tar", "--phases=p", "--logs=none"])
    assert "--phases p has no effect: there is no training data." in parse(["--val-data=x.tar", "--phases=p"]).notices


@pytest.mark.parametrize("name", ["clipa", "flip"])
def test_a_recipe_fits_its_model_and_runs_scaled_down(
    run_here: Callable[[Sequence[str]], Outcome], tmp_path: Path, name: str
) -> None:
    recipe = (RECIPES / f"{name}.yaml").read_text()
    assert check_models(phases_of(tmp_path, recipe, model="ViT-L-14")) is not None
    outcome = run_here(scaled_recipe(tmp_path, recipe))
    assert outcome.code == 0, outcome.text
    assert "Phase 2 of 2: images 32 x 32, batch 2" in outcome.text


def scaled_recipe(directory: Path, recipe: str) -> list[str]:
    """The command line of 36 samples through a recipe's phases; images of 12 and 32 pixels."""
    per = {"until_samples": 400_000_000, "image_size": 7, "text_length": 2, "batch_size": 64}
    phases = [
        {key: value // per[key] if key in per else value for key, value in phase.items()}
        for phase in yaml.safe_load(recipe)
    ]
    (directory / "small.yaml").write_text(yaml.safe_dump(phases))
    vision = TINY_MODEL["vision_cfg"] | {"patch_size": 4}  # type: ignore[operator]
    (directory / "tiny.json").write_text(json.dumps(TINY_MODEL | {"vision_cfg": vision}))
    flags = "--precision fp32 --device cpu --epochs 1 --batch-size 4 --workers 0 --warmup 1 --name r"
    pattern = write_shards(directory / "s", shards=2, samples=18)
    place = ["--model", str(directory / "tiny.json"), "--logs", str(directory), "--train-data", pattern]
    return [*flags.split(), *place, "--phases", str(directory / "small.yaml")]
