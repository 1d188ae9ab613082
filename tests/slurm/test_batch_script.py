"""The rendered batch script: whole, readable, and what bash and SLURM make of it is what was meant."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.batch_script import BatchJob, render
from slurm.sites import site_names

JOB = BatchJob(
    name="xxlarge", run="/runs/xxlarge", nodes=128, tasks_per_node=8, gpus_per_node=8, time_limit="24:00:00",
    account="laion",
)  # fmt: skip


@pytest.mark.parametrize("site", site_names())
def test_the_script_of_every_site_is_bash(site: str) -> None:
    script = render(replace(JOB, site=site))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "sbatch /runs/xxlarge/submit.sbatch" in script


def test_all_options_stand_before_the_first_command() -> None:
    """sbatch reads no further."""
    lines = render(JOB).splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert len(options) == len([line for line in lines[:first_command] if line.startswith("#SBATCH")])
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@300"} <= set(options)


def test_options_come_from_the_user_then_the_site() -> None:
    job = replace(JOB, site="juwels-booster", tasks_per_node=4, gpus_per_node=4)
    asked = {line.removeprefix("#SBATCH ") for line in render(job).splitlines() if line.startswith("#SBATCH")}
    assert {"--partition=booster", "--gres=gpu:4", "--cpus-per-task=12", "--account=laion"} <= asked
    own = render(replace(job, partition="develbooster", cpus_per_task=6, exclude=("jwb[1-2]", "jwb9"), array="0-3%1"))
    for option in ("--partition=develbooster", "--cpus-per-task=6", "--exclude=jwb[1-2],jwb9", "--array=0-3%1"):
        assert f"\n#SBATCH {option}\n" in own


def _variables(job: BatchJob, command: str) -> str:
    """What bash has in its variables before training begins."""
    prelude = render(job).split("# ---- From here on")[0]
    environment = {"PATH": "/usr/bin:/bin", "WORLD_SIZE": "8", "MASTER_ADDR": "left-over"}
    return subprocess.run(
        ["bash", "-c", f"{prelude}\n{command}"], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_flags_and_variables_reach_their_program_as_they_are() -> None:
    flags = ("--aug-cfg", "scale=(0.4, 1.0)", "--train-data", "pipe:aws s3 cp s3://b/{0..9}.tar -", "it's $HOME")
    job = replace(JOB, trainer_flags=flags, environment={"NCCL_DEBUG": "INFO", "NOTE": 'two "words" $HOME'})
    shown = _variables(job, 'printf "%s\\n" "${trainer[@]}" "$NCCL_DEBUG" "$NOTE" "${WORLD_SIZE-none}"')
    expected = ["python", "-u", "-m", "training.main", "--config", "/runs/xxlarge/submit.yaml", "--resume", "latest"]
    assert shown.splitlines() == [*expected, *flags, "INFO", 'two "words" $HOME', "none"]


def test_the_run_directory_stands_in_the_sites_variables() -> None:
    assert _variables(JOB, 'echo "$TORCH_FR_DUMP_TEMP_FILE"') == "/runs/xxlarge/hangs/nccl_rank_\n"


def test_without_a_preflight_there_is_none() -> None:
    assert _variables(replace(JOB, preflight=False), 'echo "${#preflight[@]}"') == "0\n"
    assert "doctor --slurm --run /runs/xxlarge" in _variables(JOB, 'echo "${preflight[@]}"')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "/runs/my run"}, "the run directory '/runs/my run' cannot stand in a batch script"),
        ({"run": "runs/r"}, "give an absolute path"),
        ({"run": "/runs/100%j"}, "cannot stand in a batch script"),
        ({"directory": "here"}, "the directory 'here' cannot stand"),
        ({"name": "a b"}, "--name 'a b' cannot name a job"),
        ({"nodes": 0}, "--nodes 0: give at least 1"),
        ({"site": "jureca", "account": None}, "jureca charges jobs to an account and none is given: pass --account"),
        ({"sbatch_options": ("reservation=x",)}, "'reservation=x' is no option of SLURM"),
        ({"time_limit": "1 day"}, "'1 day' cannot stand in an option of sbatch"),
        ({"site": "nowhere"}, "--site nowhere"),
    ],
)
def test_what_slurm_would_read_differently_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(replace(JOB, **change))  # type: ignore[arg-type]


def test_the_script_needs_a_job(tmp_path: Path) -> None:
    path = tmp_path / "submit.sbatch"
    path.write_text(render(replace(JOB, run=str(tmp_path))))
    done = subprocess.run(
        ["bash", str(path)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"this is a batch script: sbatch {tmp_path}/submit.sbatch" in done.stderr
