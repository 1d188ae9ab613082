"""Names and directories of runs are OpenCLIP's; a run is continued only when that was asked for."""

from __future__ import annotations

import re
import shlex
from datetime import datetime
from pathlib import Path

import pytest
from open_clip_train.params import parse_args as parse_as_openclip

from training.cli import load_config, parse, to_yaml
from training.naming import RunPaths, choose_run_name, claim_run_directory, default_name, params_text, run_paths

DATE = datetime(2024, 3, 9, 8, 5, 1)
LATER = datetime(2024, 3, 10)
FACTS = {"device": "cpu", "rank": 0, "local_rank": 0, "world_size": 1, "name": "n"}


def config_of(line: str):
    return parse(["--train-data", "a.tar", *shlex.split(line)]).config


def start_run(line: str, *, date: datetime) -> RunPaths:
    """What a run does first."""
    config = config_of(line)
    paths = run_paths(config, name=choose_run_name(config, date=date))
    claim_run_directory(paths, config=config)
    paths.out_log.touch()
    paths.params_txt.touch()
    paths.config_yaml.write_text(to_yaml(config))
    return paths


def test_the_default_name_is_openclips():
    line = "--model hf-hub:org/ViT --lr 1e-3 --batch-size 896 --workers 8 --precision amp_bfloat16"
    assert default_name(config_of(line), date=DATE) == (
        "2024_03_09-08_05_01-model_hf-hub:org-ViT-lr_0.001-b_896-j_8-p_amp_bfloat16"
    )


def test_a_given_name_is_kept():
    assert choose_run_name(config_of("--name mine"), date=DATE) == "mine"


def test_the_directory_is_laid_out_as_openclips():
    paths = run_paths(config_of("--logs /runs"), name="n", rank=3)
    assert paths == RunPaths(
        root=Path("/runs/n"),
        out_log=Path("/runs/n/out.log"),
        params_txt=Path("/runs/n/params.txt"),
        config_yaml=Path("/runs/n/config.yaml"),
        checkpoints=Path("/runs/n/checkpoints"),
        tensorboard=Path("/runs/n/tensorboard"),
        code=Path("/runs/n/code"),
        metrics_jsonl=Path("/runs/n/metrics.jsonl"),
        results_jsonl=Path("/runs/n/checkpoints/results.jsonl"),
        trace=Path("/runs/n/trace"),
        starts_jsonl=Path("/runs/n/starts.jsonl"),
        events_jsonl=Path("/runs/n/events.jsonl"),
        leases=Path("/runs/n/leases"),
        telemetry_jsonl=Path("/runs/n/telemetry.jsonl"),
        hangs=Path("/runs/n/hangs"),
    )


def test_local_logs_carry_the_rank():
    assert run_paths(config_of("--log-local"), name="n", rank=3).out_log.name == "out-3"


@pytest.mark.parametrize("logs", ["none", "None", ""])
def test_no_logs_means_no_directory(logs):
    assert run_paths(config_of(f"--logs '{logs}'"), name="n") is None


def test_claiming_makes_the_directories_that_are_written(tmp_path):
    paths = start_run(f"--logs {tmp_path}/new/logs --report-to tensorboard --name n", date=DATE)
    assert paths.checkpoints.is_dir()
    assert paths.tensorboard.is_dir()
    assert sorted(path.name for path in paths.root.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "out.log",
        "params.txt",
        "tensorboard",
    ]


def test_a_directory_that_only_holds_the_schedulers_output_is_free(tmp_path):
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "slurm-1.out").touch()
    assert start_run(f"--logs {tmp_path} --name n", date=DATE).checkpoints.is_dir()


def test_a_start_that_was_refused_leaves_a_log_and_takes_no_name(tmp_path):
    paths = start_run(f"--logs {tmp_path} --name n", date=DATE)
    paths.params_txt.unlink()
    start_run(f"--logs {tmp_path} --name n", date=DATE)


@pytest.mark.parametrize("resume", ["", "--resume some/epoch_1.pt"])
def test_a_taken_name_is_refused_without_resume_latest(tmp_path, resume):
    start_run(f"--logs {tmp_path} --name n", date=DATE)
    with pytest.raises(ValueError, match=r"a run of the name n exists already \(.*params\.txt\): pass --resume latest"):
        start_run(f"--logs {tmp_path} --name n {resume}", date=DATE)


def test_a_taken_name_is_continued_with_resume_latest(tmp_path):
    first = start_run(f"--logs {tmp_path} --name n", date=DATE)
    assert start_run(f"--logs {tmp_path} --name n --resume latest", date=LATER) == first


def test_a_logs_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"the run directory .*file/n cannot be written \(Not a directory\): pass --logs DIR"
    ):
        start_run(f"--logs {tmp_path}/file --name n", date=DATE)


def test_resume_latest_without_a_name_continues_the_run_of_the_same_command_line(tmp_path):
    line = f"--logs {tmp_path} --resume latest --model ViT-B-32 --seed 1"
    first = start_run(line, date=DATE)
    assert start_run(line, date=LATER) == first
    newest = start_run(f"--logs {tmp_path} --model ViT-B-32 --seed 1", date=LATER)
    assert newest != first
    assert start_run(line, date=LATER) == newest


def test_resume_latest_without_a_name_leaves_other_runs_alone(tmp_path, caplog):
    first = start_run(f"--logs {tmp_path} --resume latest --seed 1", date=DATE)
    second = start_run(f"--logs {tmp_path} --resume latest --seed 2", date=LATER)
    assert second != first
    assert f"has other settings, so it is not continued: pass --name {first.root.name} to do so" in caplog.text


def test_resume_latest_without_a_name_starts_a_run_where_none_can_be_continued(tmp_path):
    line = f"--logs {tmp_path}/none-yet --resume latest"
    config = config_of(line)
    assert choose_run_name(config, date=DATE) == default_name(config, date=DATE)
    (tmp_path / "none-yet" / default_name(config, date=DATE)).mkdir(parents=True)
    assert choose_run_name(config, date=LATER) == default_name(config, date=LATER)


def test_params_txt_has_every_key_of_openclip_and_its_spelling():
    line = "--model ViT-B-32 --lr 1e-3 --force-image-size 64 --image-mean 0.5 0.5 0.5 --aug-cfg scale=(0.4,1.0)"
    config = config_of(f"{line} --report-to tensorboard --debug --local-loss --logs /runs")
    text = params_text(config, paths=run_paths(config, name="n"), facts=FACTS)
    values = dict(re.fullmatch("([^:]+): (.*)", row).groups() for row in text.splitlines())
    assert list(values) == sorted(values)
    later = {"checkpoint_path", "distributed", "local_rank", "log_level", "log_path", "rank", "tensorboard"}
    later |= {"tensorboard_path", "wandb", "world_size", "distill"}
    assert vars(parse_as_openclip([])).keys() | later <= values.keys()
    expected = {
        "model": "ViT-B-32",
        "lr": "0.001",
        "beta2": "0.98",
        "force_image_size": "64",
        "image_mean": "[0.5, 0.5, 0.5]",
        "aug_cfg": "{'scale': (0.4, 1.0)}",
        "local_loss": "True",
        "pretrained": "",
        "resume": "None",
        "horovod": "False",
        "name": "n",
        "device": "cpu",
        "distributed": "False",
        "log_level": "10",
        "tensorboard": "True",
        "wandb": "False",
        "checkpoint_path": "/runs/n/checkpoints",
        "tensorboard_path": "/runs/n/tensorboard",
        "log_path": "/runs/n/out.log",
    }
    assert {name: values[name] for name in expected} == expected


def test_params_txt_without_logs_and_with_several_processes():
    config = config_of("--logs none --resume latest")
    text = params_text(config, paths=None, facts={**FACTS, "world_size": 2, "resume": "a.pt"})
    assert {"checkpoint_path: None", "distributed: True", "resume: a.pt", "tensorboard_path: "} <= set(text.split("\n"))


def test_the_record_of_a_run_is_its_configuration(tmp_path):
    paths = start_run(f"--logs {tmp_path} --name n --aug-cfg scale=(0.4,1.0)", date=DATE)
    assert load_config(paths.config_yaml) == config_of(f"--logs {tmp_path} --name n --aug-cfg scale=(0.4,1.0)")
