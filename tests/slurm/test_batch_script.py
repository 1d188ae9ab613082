"""The rendered batch script: whole, readable, and what bash and SLURM make of it is what was meant."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.bad_nodes import BAD_NODES_FILE, record_suspects
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
    look = _variables(JOB, 'echo "${preflight[@]}"')
    assert "doctor --slurm --config /runs/xxlarge/submit.yaml --quick --arrival-limit 300" in look


def test_the_snapshot_of_the_code_comes_before_the_users_own_path() -> None:
    job = replace(JOB, environment={"PYTHONPATH": "/home/me/code", "PYTHONSAFEPATH": ""})
    assert _variables(job, 'echo "$PYTHONPATH $PYTHONSAFEPATH"') == "/runs/xxlarge/code:/home/me/code 1\n"


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


REPOSITORY = Path(__file__).resolve().parents[2]
RUNNING, AT_LIMIT = "JobState=RUNNING Reason=None", "JobState=COMPLETING Reason=TimeLimit"


class Night:
    """The script of a run, with programs in the place of SLURM's that do as told and keep what they were asked."""

    def __init__(self, directory: Path, **fields: object) -> None:
        self.run = directory / "run"
        self._bin = directory / "bin"
        for folder in (self.run / "slurm", self._bin):
            folder.mkdir(parents=True)
        job = replace(JOB, run=str(self.run), python=sys.executable, **{"preflight": False, **fields})  # type: ignore[arg-type]
        (self.run / "submit.sbatch").write_text(render(job))

    def start(self, number: int, *, facts: str, act: str, **environment: str) -> tuple[int, str]:
        """One start of the job, whose steps do ``act``: the exit code, and the log with what SLURM was asked."""
        scontrol = f"""case "$1 $2" in
            "show job") echo "JobId=7 {facts} " ;;
            "show hostnames") echo n1 ;;
            *) echo "asked: $*" ;;
        esac"""
        for name, body in (("scontrol", scontrol), ("srun", f"trap '' USR1\necho \"srun $*\"\n{act}")):
            (self._bin / name).write_text(f"#!/bin/bash\n{body}\n")
            (self._bin / name).chmod(0o755)
        slurm = {"JOB_ID": "7", "JOB_NODELIST": "n1", "JOB_NUM_NODES": "1", "JOB_PARTITION": "gpu"}
        given = {f"SLURM_{name}": value for name, value in slurm.items()} | environment
        given |= {"PATH": f"{self._bin}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            ["bash", str(self.run / "submit.sbatch")],
            env={**given, "SLURM_RESTART_COUNT": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout


def _save(night: Night, step: int) -> None:
    (night.run / f"checkpoints/step_{step:08d}").mkdir(parents=True)


LATE = "kill -TERM $PPID; sleep 0.3; exit 143"
EARLY = "kill -USR1 $PPID; sleep 0.3; exit 1"
NOTHING_NEW = """kill -USR1 $PPID; sleep 0.3; echo '{"signal": "SIGUSR1", "step": 0, "n": '$RANDOM'}' >RUN/.requeue.7"""
ENOUGH = "stop with 93: three time limits in a row without a checkpoint: raise --time or --signal-before"


@pytest.mark.parametrize(
    ("facts", "act", "preflight"),
    [(AT_LIMIT, LATE, False), (RUNNING, EARLY, False), (RUNNING, NOTHING_NEW, False), (RUNNING, EARLY, True)],
    ids=["time limit", "before a first step", "saved nothing new", "in the preflight"],
)
def test_a_run_that_signals_end_before_it_saves_is_not_put_back_for_ever(
    tmp_path: Path, facts: str, act: str, preflight: bool
) -> None:
    night = Night(tmp_path, preflight=preflight)
    act = act.replace("RUN", str(night.run))
    ends = [night.start(number, facts=facts, act=act) for number in range(3)]
    assert [code for code, _ in ends] == [0, 0, 93], ends
    assert all("asked: requeue 7" in log for _, log in ends[:2])
    assert all("requeue.7" not in act or "stopped by a signal, and saved" in log for _, log in ends[:2])
    assert ENOUGH in ends[2][1]
    assert "asked: requeue 7" not in ends[2][1]
    assert "No such file" not in ends[0][1]


@pytest.mark.parametrize("facts", [AT_LIMIT, RUNNING], ids=["time limit", "before a first step"])
def test_a_checkpoint_or_a_preemption_is_no_fruitless_time_limit(tmp_path: Path, facts: str) -> None:
    night = Night(tmp_path)
    act = LATE if facts == AT_LIMIT else EARLY
    for number in range(2):
        night.start(number, facts=facts, act=act)
    # Saved in the last seconds: nobody lived to see it.
    _save(night, 5)
    assert night.start(2, facts=facts, act=act)[0] == 0
    assert (night.run / "slurm/fruitless.7").read_text() == "1 step_00000005\n"
    preempted = f"{RUNNING} PreemptTime=2026-03-01T12:00:00"
    for number in range(3, 6):
        assert night.start(number, facts=preempted, act=EARLY)[0] == 0
    assert (night.run / "slurm/fruitless.7").read_text() == "1 step_00000005\n"
    night.start(6, facts=RUNNING, act=f"mkdir {night.run}/checkpoints/step_00000006; {EARLY}")
    assert not (night.run / "slurm/fruitless.7").exists()


def test_a_cancel_in_the_preflight_is_no_time_limit(tmp_path: Path) -> None:
    night = Night(tmp_path, preflight=True)
    code, log = night.start(0, facts="JobState=CANCELLED", act=LATE)
    assert "but the job was cancelled" in log
    assert code != 0
    assert not (night.run / "slurm/fruitless.7").exists()


def test_a_sentinel_above_the_start_is_progress(tmp_path: Path) -> None:
    night = Night(tmp_path)
    _save(night, 9)
    night.start(0, facts=RUNNING, act=EARLY)
    act = NOTHING_NEW.replace("RUN", str(night.run))
    night.start(1, facts=RUNNING, act=act.replace('"step": 0', '"step": 9'))
    assert (night.run / "slurm/fruitless.7").read_text() == "2 step_00000009\n"
    night.start(2, facts=RUNNING, act=act.replace('"step": 0', '"step": 10'))
    assert not (night.run / "slurm/fruitless.7").exists()


def test_the_excluded_nodes_stay_where_the_suspected_ones_cannot_be_looked_up(tmp_path: Path) -> None:
    night = Night(tmp_path, exclude=("n[8-9]",))
    record_suspects(night.run / BAD_NODES_FILE, [("n1", "hang")])
    facts = f"{RUNNING} ExcNodeList=n[8-9]"
    assert "asked: update JobId=7 ExcNodeList=n8,n9,n1" in night.start(0, facts=facts, act="exit 1")[1]
    broken = night.run / "code/slurm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('the file system is away')")
    log = night.start(1, facts=facts, act="exit 1")[1]
    assert "could not be looked up: the excluded nodes stay as they are." in log
    assert "asked: requeue 7" in log
    assert "ExcNodeList=" not in log.replace(facts, "")


def test_the_preflight_of_an_arrays_task_looks_after_its_own_run(tmp_path: Path) -> None:
    night = Night(tmp_path, preflight=True)
    task = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}
    log = night.start(0, facts=RUNNING, act="exit 0", **task)[1]
    assert f"--arrival-limit 300 --run {night.run}-0\n" in log
    assert "--job-name=preflight --time=15 " in log
