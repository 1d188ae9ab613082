from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.checkpoint.tiny_run import build_saver, tiny_parts, train_steps
from training.checkpoint.branch import find_branch_point, has_own_checkpoint
from training.checkpoint.config_change import RULES, Rule, check_config_change, compare, remarks
from training.checkpoint.manifest import DamagedCheckpoint, read_manifest
from training.cli import config_values, parse_args
from training.config import Config

LINE = "--train-data /data/{0..9}.tar --train-num-samples 1000 --model ViT-B-32"


def _saved(line: str = "") -> dict[str, object]:
    """Settings as they come back from train.json."""
    return json.loads(json.dumps(config_values(parse_args(f"{LINE} {line}".split()))))  # type: ignore[no-any-return]


def _train(line: str = "", **more: object) -> dict[str, object]:
    return {"step": 120, "world_size": 2, "scaler": None, "config": _saved(line), **more}


def _config(line: str = "") -> Config:
    return parse_args(f"{LINE} {line}".split())


def test_every_setting_has_a_rule() -> None:
    names = {field.name for section in fields(Config) for field in fields(getattr(Config(), section.name))}
    assert set(RULES) == names


def test_the_same_line_is_no_change() -> None:
    change = check_config_change(_train(), _config(), world_size=2)
    assert (change.recorded, change.refused, change.allows_other_data, change.unsettles) == ((), (), False, False)


@pytest.mark.parametrize(
    "flag",
    ["batch-size 32", "accum-freq 2", "precision fp32", "beta2 0.95", "lr 1e-4", "aug-cfg scale=(0.5,1.0)"]
    + ["workers 1", "data-lanes 96", "s3-native off", "grad-checkpointing", "guard off", "image-mean 0.5 0.5 0.5"],
)
def test_what_people_change_in_a_run_is_allowed_and_recorded(flag: str) -> None:
    change = check_config_change(_train(), _config(f"--{flag}"), world_size=2)
    assert change.recorded[0].name == flag.split()[0].replace("-", "_")


@pytest.mark.parametrize(
    "flag",
    ["model RN50", "wd 0.1", "epochs 3", "warmup 5", "lr-scheduler const", "seed 1", "opt stableadamw", "siglip"]
    + ["lock-text", "force-image-size 64", "dataset-resampled", "grad-clip-norm 1", "train-num-samples 900"],
)
def test_what_makes_it_another_run_is_refused_unless_named(flag: str) -> None:
    name = flag.split()[0]
    with pytest.raises(ValueError, match=rf"checkpoint of step 120 was trained with:\n(.|\n)*--{name} +saved "):
        check_config_change(_train(), _config(f"--{flag}"), world_size=2)
    for spelling in (name, f"--{name}", name.replace("-", "_")):
        # "=" because argparse takes two leading dashes for a flag.
        config = _config(f"--{flag} --allow-config-change={spelling}")
        check = compare(_saved(), config_values(config), allowed=config.checkpoint.allow_config_change)
        assert name.replace("-", "_") in check.as_json()


def test_all_refused_settings_are_listed_in_one_message_that_says_how_to_go_on() -> None:
    with pytest.raises(ValueError, match="--branch-from") as caught:
        check_config_change(_train(), _config("--wd 0.1 --epochs 3"), world_size=2)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  --wd      saved 0.2  now 0.1", "  --epochs  saved 32   now 3"]
    assert "--allow-config-change wd epochs" in lines[3]


def test_how_a_run_is_started_is_no_change() -> None:
    config = _config("--resume latest --take-over --allow-config-change wd")
    assert check_config_change(_train(), config, world_size=2).recorded == ()


def test_a_checkpoint_of_an_earlier_version_had_the_defaults_of_what_it_did_not_know() -> None:
    train = _train()
    known = {name: train["config"][name] for name in ("model", "train_data", "train_num_samples")}  # type: ignore[index]
    assert check_config_change({**train, "config": known}, _config(), world_size=2).recorded == ()
    change = check_config_change({**train, "config": known}, _config("--guard off"), world_size=2)
    assert change.as_json() == {"guard": ["on", "off"]}


def test_values_that_the_model_fills_in_are_compared_as_filled_in() -> None:
    train = _train()
    train["config"] |= {"lr": None, "beta2": None}  # type: ignore[operator]
    assert check_config_change(train, _config("--lr 5e-4 --beta2 0.98"), world_size=2).recorded == ()
    assert check_config_change(train, _config("--beta2 0.95"), world_size=2).as_json() == {"beta2": [0.98, 0.95]}


def test_other_names_of_the_same_precision_are_no_change() -> None:
    assert compare(_saved("--precision amp_bf16"), _saved("--precision amp_bfloat16")).recorded == ()


def test_the_length_of_an_epoch_may_change_with_the_sources() -> None:
    change = compare(_saved(), {**_saved(), "train_data": "/other/{0..9}.tar", "train_num_samples": 900})
    assert set(change.as_json()) == {"train_data", "train_num_samples"}
    assert change.allows_other_data


def test_another_seed_that_is_named_makes_another_stream_of_samples() -> None:
    assert compare(_saved(), {**_saved(), "seed": 3}, allowed=["seed"]).allows_other_data
    assert compare(_saved(), _saved(), allowed=["--train-data"]).allows_other_data
    assert not compare(_saved(), {**_saved(), "wd": 0.3}, allowed=["wd"]).allows_other_data


def test_another_world_is_recorded_and_unsettles_only_with_the_global_batch() -> None:
    change = check_config_change(_train(), _config(), world_size=4)
    assert change.as_json() == {"world_size": [2, 4], "global_batch_size": [128, 256]}
    assert change.unsettles
    change = check_config_change(_train(), _config("--batch-size 32"), world_size=4)
    assert change.as_json() == {"batch_size": [64, 32], "world_size": [2, 4]}
    assert not change.unsettles


def test_a_branch_may_change_everything() -> None:
    change = check_config_change(_train(), _config("--wd 0.1 --seed 4 --model RN50"), world_size=2, branches=True)
    assert {"wd", "seed", "model"} <= set(change.as_json())
    assert change.refused == ()


def test_the_log_tells_what_changed_and_what_becomes_of_the_loss_scaler() -> None:
    train = _train("--precision amp", scaler={"scale": 1024.0})
    config = _config("--precision amp_bf16 --lr 1e-4")
    change = check_config_change(train, config, world_size=2)
    assert remarks(change, train, config) == [
        "Changed since step 120: --lr 0.0005 -> 0.0001, --precision 'amp' -> 'amp_bf16'.",
        "The loss scaler's state is dropped: --precision amp_bf16 has no scaler.",
    ]
    back = replace(config, engine=replace(config.engine, precision="amp"))
    assert remarks(compare({}, {}), _train(), back) == [
        "The checkpoint has no loss scaler: it starts at its initial scale."
    ]


def test_rules_name_no_setting_twice() -> None:
    assert {Rule.FREE, Rule.FIXED, Rule.WITH_DATA, Rule.OF_THE_START} == set(RULES.values())
    assert (RULES["train_data"], RULES["wd"], RULES["resume"]) == (Rule.FREE, Rule.FIXED, Rule.OF_THE_START)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    parts = tiny_parts()
    saver = build_saver(tmp_path / "logs/parent/checkpoints", parts)
    for _ in range(2):
        train_steps(parts)
        saver.save_now_and_wait(epoch=0, reason="test")
    return tmp_path / "logs/parent"


def test_a_branch_starts_from_the_step_that_is_named(parent: Path) -> None:
    for spec in ("parent@1", f"{parent}@1"):
        point = find_branch_point(spec, logs=parent.parent)
        assert point.directory == parent / "checkpoints/step_00000001"
    manifest = read_manifest(point.directory)
    assert point.as_json() == {"run": str(parent), "step": 1, "manifest_sha256": manifest.sha256}
    assert find_branch_point("parent@latest", logs=parent.parent).manifest.step == 2


def test_a_branch_from_what_does_not_exist_is_refused(parent: Path) -> None:
    logs = parent.parent
    with pytest.raises(ValueError, match=r"no checkpoint of this step .*\(there: 1, 2\)"):
        find_branch_point("parent@7", logs=logs)
    with pytest.raises(ValueError, match=r"--branch-from uncle@...: there is neither"):
        find_branch_point("uncle@7", logs=logs)
    (logs / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no step checkpoint"):
        find_branch_point("empty@latest", logs=logs)


def test_a_branch_from_a_damaged_checkpoint_is_refused(parent: Path) -> None:
    weights = parent / "checkpoints/step_00000001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"ruin")
    with pytest.raises(DamagedCheckpoint, match="now reads as"):
        find_branch_point("parent@1", logs=parent.parent)


def test_a_child_that_was_saved_no_longer_asks_for_its_parent(parent: Path) -> None:
    assert has_own_checkpoint(parent / "checkpoints")
    assert not has_own_checkpoint(parent.parent / "child/checkpoints")
    assert not has_own_checkpoint(None)
