"""Curricula: what a file may say, what a model can go through, what it costs, and that the recipes run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.weights import resize_image_positions
from tests.end_to_end.conftest import TINY_MODEL, Outcome
from tests.end_to_end.conftest import run_here as run_here
from tests.factories import write_shards
from training.assembly import build_model
from training.checkpoint.config_change import check_config_change, remarks
from training.checkpoint.epoch_loading import whole_shapes
from training.checkpoint.positions import PositionTable, ResizedRows, Resizing, find_resizing
from training.checkpoint.run_state import image_hw_of
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


def grid_phases(tmp_path: Path, before: list[int], after: list[int], **optim: Any) -> Phases:
    """Two phases of a model with patches of 4 pixels."""
    vision = {"image_size": before, "layers": 1, "width": 32, "patch_size": 4, "head_width": 8}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(TINY_MODEL | {"vision_cfg": vision}))
    phases = phases_of(tmp_path, f"- {{until_samples: 9}}\n- {{image_size: {after}}}", model=str(path))
    configs = [replace(phase.config, optim=replace(phase.config.optim, **optim)) for phase in phases.all]
    return replace(
        phases, all=tuple(replace(phase, config=config) for phase, config in zip(phases.all, configs, strict=True))
    )


@pytest.mark.parametrize("before", [[16, 16], [8, 8]])
def test_an_optimizer_whose_state_cannot_be_resized_is_refused_before_the_first_step(
    tmp_path: Path, before: list[int]
) -> None:
    """Of the five positions of 8 x 8 pixels it keeps a value for each weight, and rows and columns only of more."""
    adafactor = {"opt": "timm/adafactor", "beta1": None, "beta2": None, "eps": None}
    with pytest.raises(ValueError, match=r"phase 2: the optimizer keeps 'visual.positional_embedding//.* --opt adamw"):
        check_models(grid_phases(tmp_path, before, [32, 32], **adafactor))
    check_models(grid_phases(tmp_path, before, before, **adafactor))
    for name in ("timm/lion", "stableadamw", "nadamw"):
        check_models(grid_phases(tmp_path, [16, 16], [32, 32], opt=name))


@pytest.mark.parametrize(
    ("before", "after", "old", "new"),
    [
        ([64, 16], [128, 32], (16, 4), (32, 8)),  # as many places as 8 x 8
        ([32, 16], [32, 32], (8, 4), (8, 8)),
        ([64, 16], [16, 64], (16, 4), (4, 16)),  # as many as before, at other places
    ],
)
def test_a_grid_that_is_no_square_is_resized_as_what_it_is(
    tmp_path: Path, before: list[int], after: list[int], old: tuple[int, int], new: tuple[int, int]
) -> None:
    phases = grid_phases(tmp_path, before, after)
    check_models(phases)
    first, second = (build_model(phase.config, skeleton=True).model for phase in phases.all)
    saved, shapes = whole_shapes(first), whole_shapes(second)
    resizing = find_resizing(second, shapes, saved, image_hw=(before[0], before[1]))
    assert resizing is not None
    assert (resizing.old, resizing.table.grid) == (old, new)
    assert find_resizing(first, saved, saved, image_hw=(before[0], before[1])) is None
    if saved != shapes:
        with pytest.raises(ValueError, match=r"of what image size the first are is not known"):
            find_resizing(second, shapes, saved, image_hw=None)


@pytest.mark.parametrize(
    ("train", "size"),
    [
        ({"image_size": [64, 16], "config": {"force_image_size": [32]}}, (64, 16)),
        ({"phase": {"number": 2, "image_size": [48]}, "config": {"force_image_size": [32]}}, (48, 48)),
        ({"config": {"model": "ViT-B-32", "force_image_size": None}}, (224, 224)),
        ({"config": {"model": "/gone.json"}}, None),
        ({}, None),
    ],
)
def test_a_checkpoint_tells_its_image_size_or_that_nobody_knows(
    train: dict[str, Any], size: tuple[int, int] | None
) -> None:
    """The first is as they are written now."""
    assert image_hw_of(train) == size


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


def test_an_epoch_begins_where_the_step_before_ended_one_whatever_the_size_of_the_next() -> None:
    small, large = (TrainPlan(100, 3, 1, batch, 1, 1) for batch in (4, 64))
    assert small.begins_epoch(128, last_batch=64)
    assert not large.begins_epoch(108, last_batch=4)
    for plan in (small, large):
        assert plan.begins_epoch(0, last_batch=0)
        assert plan.begins_epoch(100, last_batch=0)  # of an earlier version: as if no batch had changed


def test_steps_follow_the_phases_and_one_that_is_stepped_over_is_said(tmp_path: Path) -> None:
    phases = phases_of(tmp_path, "- {until_samples: 100}\n- {until_samples: 120, batch_size: 4}\n- {batch_size: 8}")
    assert [phases.steps_until(samples, ranks=1) for samples in (0, 64, 100, 128, 160)] == [0, 1, 2, 2, 6]
    remarks = phases.check(samples_per_epoch=80, epochs=2, ranks=1)
    assert remarks == [
        "Phase 2 is left out: the last step of the phase before ends after 128 samples, and its until_samples are 120."
    ]


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
