"""What ``clipyard submit`` refuses, plans and writes; SLURM itself is asked in tests/cluster/test_submit.py."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slurm import checks
from slurm.bad_nodes import BAD_NODES_FILE, record_suspects
from slurm.batch_script import BatchJob
from slurm.data_facts import DataFacts
from slurm.launch import Request, Submission, prepare, send_with_sbatch, submit
from slurm.squeue import find_jobs, find_partition, parse_time_s
from slurm.submitit_executor import send_with_submitit
from tests.s3.client import Bucket
from tests.s3.server import Fault
from training.cli import config_values, load_config, parse, parse_args
from training.commands import check_resume
from training.commands.submit import build_parser, main, make_request
from training.config import Config

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("--dataset-type=synthetic", "--train-num-samples=4000", "--batch-size=4", "--epochs=1", "--workers=0"),
    *("--model=demo-vit", "--precision=fp32", "--device=cpu", "--name=a"),
)
GPU = ("--dataset-type=synthetic", "--train-num-samples=100000000", "--model=ViT-B-32", "--name=a", "--workers=6")


def request_for(tmp_path: Path, *trainer: str, base: tuple[str, ...] = TINY, **fields: object) -> Request:
    values = {"nodes": 2, "shared_run_directory": True, "cluster_checks": False, **fields}
    return Request((*base, f"--logs={tmp_path}", *trainer), **values)  # type: ignore[arg-type]


def prepared(tmp_path: Path, *trainer: str, base: tuple[str, ...] = TINY, **fields: object) -> Submission:
    return prepare(request_for(tmp_path, *trainer, base=base, **fields), now=NOW)


def numbered(*numbers: str):
    """Stands for sbatch: hands out job numbers."""
    remaining = iter(numbers)
    return lambda script, job, options: next(remaining)


def program(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


# Without torch


def test_a_login_node_without_torch_plans_and_renders_the_historical_run(tmp_path):
    blocked = (
        "import sys; sys.modules['torch'] = None; from training.commands.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [
        "submit",
        "configs/runs/convnext-xxlarge.yaml",
        "--nodes=128",
        "--site=aws-parallelcluster-efa",
        "--dry-run",
    ]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "128 nodes x 8 GPUs = 1,024 ranks" in done.stdout
    assert "#SBATCH --nodes=128" in done.stdout
    assert "81,920 = 80 per rank x 1,024 ranks x 1 micro-steps" in done.stdout


@pytest.mark.parametrize(
    ("name", "inert"), [("convnext-xxlarge", []), ("vit-b-32-256-jureca", ["--zeroshot-frequency"])]
)
def test_in_the_historical_run_files_only_the_zero_shot_flag_does_nothing_as_it_did_then(name, inert):
    notices = parse([f"--config={ROOT / 'configs' / 'runs' / name}.yaml"]).notices
    assert [notice.split()[0] for notice in notices] == inert


def test_a_dry_run_writes_nothing_and_needs_no_slurm(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    words = [*("--nodes", "2", "--shared-run-directory", "--dry-run", "--logs", str(tmp_path / "logs"), "--"), *TINY]
    assert main(words) == 0
    assert "#SBATCH --nodes=2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_without_sbatch_submit_says_where_to_go(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["--nodes", "2", "--logs", str(tmp_path), "--", *TINY]) == 1
    assert "there is no sbatch here: run this on a login node" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="there is no sbatch here"):
        send_with_sbatch(tmp_path / "x", BatchJob("a", str(tmp_path), 1, 1, "1"))


# What is written


def test_the_run_directory_holds_all_that_the_script_needs(tmp_path):
    submission = prepared(tmp_path, max_restarts=3, partition="gpu", environment={"A": "b"})
    assert submit(submission, send=numbered("4711"), now=NOW) == "4711"
    run = tmp_path / "a"
    assert {path.name for path in run.iterdir()} == {"code", "slurm", "submit.json", "submit.sbatch", "submit.yaml"}
    settings = load_config(run / "submit.yaml")
    assert (settings.logging.name, settings.logging.logs, settings.data.batch_size) == ("a", str(tmp_path), 4)
    record = json.loads((run / "submit.json").read_text())
    assert (record["job_ids"], record["world_size"], record["global_batch"], record["steps"]) == (["4711"], 2, 8, 500)
    script = (run / "submit.sbatch").read_text()
    assert f"#SBATCH --chdir={os.getcwd()}" in script
    assert "PYTHONSAFEPATH" in script


def test_a_second_job_is_added_to_the_record_and_lifts_a_cancel(tmp_path):
    submit(prepared(tmp_path), send=numbered("1"), now=NOW)
    (tmp_path / "a" / ".no-requeue").touch()
    again = prepared(tmp_path)
    assert "the run was cancelled: .no-requeue is removed" in " ".join(again.summary.split())
    submit(again, send=numbered("2"), now=NOW)
    assert json.loads((tmp_path / "a" / "submit.json").read_text())["job_ids"] == ["1", "2"]
    assert not (tmp_path / "a" / ".no-requeue").exists()


def test_an_array_that_is_submitted_again_after_a_cancel_requeues_again(tmp_path):
    submit(prepared(tmp_path, array="0-1"), send=numbered("1"), now=NOW)
    task = tmp_path / "a-1"
    task.mkdir()
    (task / ".no-requeue").touch()
    again = prepared(tmp_path, array="0-1")
    assert "the run was cancelled: .no-requeue is removed" in " ".join(again.summary.split())
    submit(again, send=numbered("2"), now=NOW)
    assert not (task / ".no-requeue").exists()


@pytest.mark.parametrize(
    ("fields", "asked", "assumed"),
    [
        ({}, "--cpus-per-task=7", True),
        ({"cpus_per_task": 3}, "--cpus-per-task=3", False),
        ({"sbatch_options": ("--cpus-per-gpu=9",)}, "--cpus-per-gpu=9", False),
        ({"site": "jureca", "account": "a"}, "--cpus-per-task=", False),
    ],
)
def test_a_rank_gets_cores_for_its_workers_unless_somebody_has_said_how_many(tmp_path, fields, asked, assumed):
    submission = prepared(tmp_path, base=GPU, gpus_per_node=4, **fields)
    options = [line for line in submission.script.splitlines() if line.startswith("#SBATCH --cpus-per-")]
    assert len(options) == 1
    assert options[0].startswith(f"#SBATCH {asked}")
    assert ("7 cores a rank, one for it and one for each of its workers (--cpus-per-task)" in submission.summary) == (
        assumed
    )


def test_the_first_start_avoids_suspected_nodes_as_far_as_others_are_left(tmp_path, monkeypatch):
    program(tmp_path / "bin", "sbatch", 'echo "$@" >&2; exit 1')
    nodes = "echo 'n1 idle'; echo 'n2 idle'; echo 'n3 idle'"
    program(tmp_path / "bin", "sinfo", f"case \"$*\" in *--Node*) {nodes};; *) echo 'gpu|3|infinite|gpu*';; esac")
    program(tmp_path / "bin", "squeue", "true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "logs" / "a").mkdir(parents=True)
    for node, age in (("n1", 2), ("n2", 1)):
        record_suspects(tmp_path / "logs" / "a" / BAD_NODES_FILE, [(node, "hang")], time=NOW - timedelta(hours=age))
    submission = prepared(tmp_path / "logs", cluster_checks=True, python_check=False)
    assert "avoids suspected nodes: n2 (bad_nodes.jsonl)" in submission.summary
    with pytest.raises(RuntimeError, match="--parsable --exclude=n2 .*submit.sbatch"):
        submit(submission, send=send_with_sbatch, now=NOW)


def test_a_job_that_sbatch_refuses_leaves_no_record(tmp_path, monkeypatch):
    program(tmp_path / "bin", "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"sbatch refused .*submit.sbatch: .*invalid partition specified: x"):
        submit(prepared(tmp_path), send=send_with_sbatch, now=NOW)
    assert not (tmp_path / "a" / "submit.json").exists()


def test_submitit_says_what_sbatch_said(tmp_path, monkeypatch):
    program(tmp_path / "bin", "sbatch", "echo 'invalid account' >&2; exit 1")
    program(tmp_path / "bin", "srun", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"submitit could not submit .*invalid account"):
        submit(prepared(tmp_path), send=send_with_submitit, now=NOW)


def waiting_for(submission: Submission, *jobs: str) -> Submission:
    return Submission(**{**vars(submission), "live_jobs": jobs})


def test_a_job_behind_another_of_the_run_must_not_change_what_that_one_uses(tmp_path):
    submit(prepared(tmp_path), send=numbered("1"), now=NOW)
    submit(waiting_for(prepared(tmp_path), "1"), send=numbered("2"), now=NOW + timedelta(hours=1))
    with pytest.raises(ValueError, match="the settings differ from those of job 1"):
        submit(waiting_for(prepared(tmp_path, "--lr=1e-4"), "1"), send=numbered("3"), now=NOW)
    snapshot = tmp_path / "a" / "code" / "SNAPSHOT.json"
    snapshot.write_text('{"digest": "other"}')
    with pytest.raises(ValueError, match="the code has changed since job 1 was submitted"):
        submit(waiting_for(prepared(tmp_path), "1"), send=numbered("3"), now=NOW)


def test_long_epochs_get_checkpoints_in_between_unless_the_user_decides(tmp_path):
    decided = {
        minutes: prepared(tmp_path, base=GPU, gpus_per_node=4, checkpoint_minutes=minutes).config.checkpoint
        for minutes in (None, 0, 25)
    }
    assert [checkpoint.save_every_n_minutes for checkpoint in decided.values()] == [11, 0, 25]
    own = prepared(tmp_path, "--save-every-n-steps=100", base=GPU, gpus_per_node=4)
    assert own.config.checkpoint.save_every_n_minutes == 0
    assert "how long an epoch takes is not known here, so submit adds" in " ".join(prepared(tmp_path).summary.split())


def test_a_global_batch_is_divided_among_the_ranks(tmp_path):
    submission = prepared(tmp_path, "--accum-freq=2", base=GPU, gpus_per_node=4, global_batch=4096)
    assert submission.config.data.batch_size == 256


def test_a_run_without_training_data_is_submitted_to_evaluate(tmp_path):
    words = ("--model=demo-vit", "--device=cpu", f"--val-data={tmp_path}/v.tar", "--name=a")
    assert "the run only evaluates" in prepared(tmp_path, base=words).summary


def test_gpus_in_all_stand_for_nodes(tmp_path):
    assert prepared(tmp_path, base=GPU, nodes=None, gpus=12, gpus_per_node=4).job.nodes == 3


# What is refused


@pytest.mark.parametrize(
    ("trainer", "fields", "message"),
    [
        (
            (),
            {"gpus": 10, "gpus_per_node": 4, "nodes": None},
            "--gpus 10 cannot be divided among nodes of 4: .* 8 or 12",
        ),
        ((), {"gpus": 16, "gpus_per_node": 4}, "--gpus 16 is not --nodes 2 x 4 a node = 8"),
        ((), {"gpus_per_node": 4, "nodes": 0}, "--nodes 0 must be at least 1"),
        ((), {}, "--gpus-per-node is missing, and site generic does not say it"),
        ((), {"site": "jureca", "account": "a", "gpus_per_node": 8}, "nodes of site jureca have 4"),
        ((), {"site": "jureca"}, "--account is missing: site jureca"),
        ((), {"site": "jurica", "gpus_per_node": 1}, "did you mean jureca"),
        ((), {"gpus_per_node": 4, "tasks_per_node": 2}, "--tasks-per-node 2 is not --gpus-per-node 4"),
        ((), {"gpus_per_node": 4, "global_batch": 1001}, "--global-batch 1001 .* among 8 ranks .* pass 1000 or 1008"),
        ((), {"gpus_per_node": 4, "time_limit": "soon"}, "--time 'soon' is no time"),
        ((), {"gpus_per_node": 4, "checkpoint_minutes": -1}, "--checkpoint-minutes -1 must be at least 0"),
        ((), {"gpus_per_node": 4, "time_limit": "5"}, "a time limit of 300 s is too short for one checkpoint"),
        ((), {"gpus_per_node": 4, "time_limit": "0:00"}, "--time '0:00' is unlimited for SLURM.* pass a limit such as"),
        ((), {"gpus_per_node": 4, "time_limit": "UNLIMITED"}, "--time 'UNLIMITED' is unlimited for SLURM"),
        ((), {"gpus_per_node": 4, "max_restarts": -1}, "--max-restarts -1 must be at least 0"),
        ((), {"gpus_per_node": 4, "cpus_per_task": -3}, "--cpus-per-task -3 must be at least 1"),
        ((), {"gpus_per_node": 4, "exclude": ("n1", "n[1-")}, r"--exclude n\[1-: .* is not closed"),
        (("--device=cpu",), {"gpus_per_node": 4}, "--gpus-per-node 4, but --device cpu uses none"),
        (("--device=cpu",), {"tasks_per_node": 0}, "0 ranks a node"),
        (("--logs=none",), {"gpus_per_node": 4}, "--logs none keeps no checkpoints to requeue from"),
        (("--logs=/tmp/a b",), {"gpus_per_node": 4}, "sbatch gives spaces, quotes and % a meaning"),
        (("--name=a/b",), {"gpus_per_node": 4}, "--name 'a/b': pass one of letters"),
        (("--resume=/x/epoch_1.pt",), {"gpus_per_node": 4}, "--resume /x/epoch_1.pt: every start .* --branch-from"),
        (("--lr=fast",), {"gpus_per_node": 4}, "--lr: 'fast' is not a number"),
        (("--dataset-type=auto", "--train-data=/no/{0..9}.tar"), {"gpus_per_node": 4}, "pass --data-elsewhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, trainer, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, *trainer, base=GPU, **fields)
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_a_batch_script_cannot_hold_is_refused(tmp_path, monkeypatch):
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    with pytest.raises(ValueError, match="the working directory '.*my runs': .* Call submit in another"):
        prepared(tmp_path / "logs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "1=2"], "--env '1=2' is not NAME=VALUE"),
        (["--sbatch-option", "qos"], "--sbatch-option 'qos' is no option"),
        (["--mfu", "40"], "--mfu 40.0 must be more than 0 and at most 1"),
        (["--sample-kb", "0"], "--sample-kb 0.0 must be more than 0"),
    ],
)
def test_options_of_the_wrong_form_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        make_request(build_parser().parse_args(words), ())


@pytest.mark.parametrize(
    ("run", "environment", "reason"),
    [
        ("/tmp/logs/a", {}, "it is under /tmp"),
        ("/dev/shm/a", {}, "it is under /dev/shm"),
        ("/home/me/scratch/a", {"TMPDIR": "/home/me/scratch"}, r"\$TMPDIR is /home/me/scratch"),
        ("/local/a", {}, "it is under /local"),
        ("/proc/1/a", {}, None),
    ],
)
def test_a_run_directory_that_one_node_sees_is_refused(run: str, environment: Mapping[str, str], reason: str | None):
    if reason is None:
        checks.check_shared(Path(run), environment=environment)
        return
    with pytest.raises(ValueError, match=rf"node-local \({reason}\).* pass --shared-run-directory"):
        checks.check_shared(Path(run), node_local=["/local"], environment=environment)


def test_a_directory_in_memory_is_known_by_its_file_system():
    assert checks._file_system(Path("/dev/shm/x")) == "tmpfs"
    assert checks._file_system(Path("/proc/1")) == "proc"


def test_a_run_directory_that_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match=r"the run directory /proc/logs/a cannot be written .* in /proc"):
        checks.check_writable(Path("/proc/logs/a"))


def test_a_run_that_another_process_holds_is_refused(tmp_path):
    text = "import sys, time; from pathlib import Path; from training.resilience.lease import claim_lease\n"
    text += f"claim_lease(Path({str(tmp_path / 'a' / 'leases')!r}), take_over=False)\n"
    text += "print('held', flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"run a is in use by process {holder.pid} on .* or choose another --name"):
            checks.check_nobody_uses(tmp_path / "a", dependency=None)
        holder.kill()
    assert checks.check_nobody_uses(tmp_path / "a", dependency=None) == []


def test_a_run_that_slurm_is_silent_about_is_not_overwritten(tmp_path, monkeypatch):
    submit(prepared(tmp_path), send=numbered("7"), now=NOW)
    program(tmp_path / "bin", "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for dependency in (None, "afterany:7"):
        with pytest.raises(RuntimeError, match="SLURM does not answer, so whether jobs 7 wait or run is not known"):
            checks.check_nobody_uses(tmp_path / "a", dependency=dependency)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_nobody_uses(tmp_path / "a", dependency=None) == []


@pytest.mark.parametrize(
    ("python", "setup", "message"),
    [
        ("/no/such/python", [], "the job's interpreter /no/such/python does not run here"),
        ("old", [], "the job's interpreter .*old is Python 3.8: pass --python with 3.11 or newer"),
        ("bare", [], "the job's interpreter .*bare lacks torch, timm: pass --python"),
        (sys.executable, ["module load NoSuchModule"], "the job's set-up fails here: .*module"),
    ],
)
def test_an_interpreter_that_cannot_train_is_refused(tmp_path, python, setup, message):
    program(tmp_path / "bin", "old", "echo 'CLIPYARD|3.8'")
    program(tmp_path / "bin", "bare", "echo 'CLIPYARD|3.12|torch|timm'")
    python = str(tmp_path / "bin" / python) if python in ("old", "bare") else python
    with pytest.raises(ValueError, match=message):
        checks.check_python(python, setup=setup)


def test_this_interpreter_can_train_after_its_set_up():
    checks.check_python(sys.executable, setup=["export A=1", "test $A = 1"])


def saved(directory: Path, **settings: object) -> Path:
    """The part of a checkpoint that is compared."""
    checkpoint = directory / "step_00000010"
    checkpoint.mkdir()
    config = config_values(load_config_text(directory, prepared(directory).settings)) | settings
    train = {"step": 10, "world_size": 2, "config": json.loads(json.dumps(config))}
    (checkpoint / "train.json").write_text(json.dumps(train))
    return checkpoint


def load_config_text(directory: Path, text: str) -> Config:
    (directory / "settings.yaml").write_text(text)
    return load_config(directory / "settings.yaml")


def test_settings_that_the_checkpoint_forbids_are_refused_before_the_job_waits(tmp_path):
    checkpoint = saved(tmp_path, epochs=7)
    asked = {"world_size": 2, "python": sys.executable}
    settings = prepared(tmp_path).settings
    with pytest.raises(ValueError, match=r"cannot go on from step_00000010 with these settings: [\s\S]*epochs"):
        checks.check_resume(checkpoint, settings, setup=["true"], **asked)
    (remark,) = checks.check_resume(checkpoint, settings, setup=["exit 1"], **asked)
    assert "were not compared with step_00000010" in remark


@pytest.mark.parametrize(
    ("flags", "damaged", "code"), [((), False, 3), (("--allow-config-change=epochs",), False, 0), ((), True, 0)]
)
def test_the_trainers_own_rules_judge_the_settings(tmp_path, monkeypatch, capsys, flags, damaged, code):
    checkpoint = saved(tmp_path, epochs=7)
    if damaged:
        (checkpoint / "train.json").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO(prepared(tmp_path, *flags).settings))
    assert check_resume.main([str(checkpoint), "--world-size=2"]) == code
    assert ("--allow-config-change" in capsys.readouterr().out) == (code == 3)


# Credentials


def s3_facts(url: str) -> DataFacts:
    return DataFacts("webdataset", 10, 1, num_shards=1, first_shard=url)


CONFIG = parse_args(TINY)


@pytest.mark.parametrize("written", ["environment", "file"])
def test_expired_credentials_are_refused_before_the_job_waits_for_hours(tmp_path, written):
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = a\nexpiration = 2026-05-01T11:00:00+00:00\n")
    environments = {
        "environment": {"AWS_CREDENTIAL_EXPIRATION": "2026-05-01T11:00:00Z"},
        "file": {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials")},
    }
    with pytest.raises(ValueError, match=r"expired at 2026-05-01T11:00\+00:00: log in again"):
        checks.check_credentials(CONFIG, s3_facts("s3://b/0.tar"), now=NOW, environment=environments[written])


def test_credentials_that_end_later_are_remarked_on(s3: Bucket):
    environment = {"AWS_CREDENTIAL_EXPIRATION": "2026-05-01T18:00:00Z"}
    url = s3.put("0.tar", b"x" * 1024)
    (remark,) = checks.check_credentials(CONFIG, s3_facts(url), now=NOW, environment=environment)
    assert "expire at 2026-05-01T18:00+00:00" in remark


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "may not be read with the credentials here: .* pass --data-elsewhere"),
        (403, "ExpiredToken", "may not be read with the credentials here"),
        (404, "NoSuchKey", "the first shard does not exist: .* Correct --train-data"),
    ],
)
def test_a_first_shard_that_is_refused_stops_the_submission(s3: Bucket, status, code, message):
    url = s3.put("0.tar", b"x" * 1024)
    s3.faults("0.tar", Fault(status=status, code=code))
    with pytest.raises(ValueError, match=message):
        checks.check_credentials(CONFIG, s3_facts(f"pipe:aws s3 cp {url} -"), now=NOW, environment={})


def test_a_network_that_login_nodes_do_not_have_is_no_reason_to_refuse(s3: Bucket):
    url = s3.put("0.tar", b"x" * 1024)
    s3.faults("0.tar", Fault(status=503, code="SlowDown"))
    (remark,) = checks.check_credentials(CONFIG, s3_facts(url), now=NOW, environment={})
    assert "could not be read from here" in remark


# SLURM's programs


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("24:00:00", 86_400),
        ("1-00", 86_400),
        ("1-02:03", 93_780),
        ("2-01:01:01", 176_461),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text, seconds):
    assert parse_time_s(text) == seconds


@pytest.mark.parametrize(
    ("partition", "nodes", "time", "message"),
    [
        ("gpux", 1, "1:00:00", "there is no partition gpux here: pass --partition with one of gpu, cpu"),
        ("cpu,gpux", 1, "1:00:00", "there is no partition gpux here"),
        ("cpu,gpu", 9, "1:00:00", "--nodes 9: partition cpu,gpu has 8 nodes"),
        ("gpu", 9, "1:00:00", "--nodes 9: partition gpu has 8 nodes, so the job would wait for ever"),
        ("gpu", 8, "25:00:00", r"--time 25:00:00 is longer than partition gpu allows \(24:00:00\)"),
    ],
)
def test_what_would_wait_for_ever_is_refused(tmp_path, monkeypatch, partition, nodes, time, message):
    program(tmp_path, "sinfo", "echo 'gpu|5|1-00:00:00|gpu*'; echo 'gpu|3|1-00:00:00|gpu*'; echo 'cpu|4|infinite|cpu'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    limit = {"nodes": nodes, "time_limit_s": parse_time_s(time), "time_limit": time}
    with pytest.raises(ValueError, match=message):
        checks.check_partition(partition, **limit)
    checks.check_partition("cpu", nodes=4, time_limit_s=10**7, time_limit=time)
    assert find_partition(None) == ("gpu", 8, 86_400)
    assert find_partition("gpu,cpu") == ("gpu,cpu", 8, None)


def test_jobs_that_slurm_has_forgotten_are_none_and_a_silent_slurm_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert find_jobs(["1"]) == []
    program(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert find_jobs(["1"]) is None
    program(tmp_path, "squeue", "echo '7|PENDING|Priority|128|  |1-00:00:00|2026-01-01T00:00:00'")
    (job,) = find_jobs(["7"]) or ()
    assert (job.job, job.reason, job.node_list, job.is_live) == ("7", "Priority", "", True)
