"""``clipyard status``, ``logs`` and ``cancel`` on run directories, with real processes and without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from slurm.bad_nodes import record_suspects
from slurm.cancel import cancel_run
from slurm.run_record import job_ids, read_submission, script_jobs, script_logs, write_submission
from slurm.run_status import read_status, render_status
from training.commands import cancel, logs, status

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime.now(UTC)
SILENT = "echo 'Unable to contact slurm controller' >&2; exit 1"
PLAN = "2026-01-01,00:00:00 | INFO | 2 epochs of 50 steps; global batch 8 = 4 per rank x 2 ranks x 1 micro-steps\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two starts of job 7, at step 30 of 100, on a machine whose SLURM has forgotten the job."""
    (tmp_path / "bin").mkdir()
    answer(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    for name in ("sacct", "scancel"):
        answer(tmp_path, name, SILENT)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    directory = tmp_path / "run"
    (directory / "slurm").mkdir(parents=True)
    (directory / "leases").mkdir()
    checkpoint(directory, 20)
    starts = [{"step": step, "time": "T", "job": "7", "restart": n, "world_size": 2} for n, step in enumerate((0, 20))]
    (directory / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    point = {"train/batch_time": 0.5, "train/samples_per_second": 16.0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **point}) + "\n" for s in (9, 19, 29)))
    (directory / "out.log").write_text(PLAN + "a\nb\nc\n")
    return directory


def answer(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / "bin" / name).chmod(0o755)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").write_text("{}")


@contextmanager
def holder(run: Path, *, then: str) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the run, and does something when it is asked to end."""
    text = (
        "import signal, sys, time; from pathlib import Path; from training.resilience.lease import claim_lease\n"
        f"run = Path({str(run)!r})\n"
        f"def end(number, frame):\n    {then}\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "claim_lease(run / 'leases', take_over=False)\nprint('held', flush=True)\n"
        "while True:\n    time.sleep(0.05)"
    )
    with subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # A zombie is nobody's process, but some test must wait for it.
        threading.Thread(target=process.wait, daemon=True).start()
        try:
            yield process
        finally:
            process.kill()


def test_how_far_a_run_is_and_how_long_it_takes_is_read_from_its_files(run):
    found = read_status(run, now=NOW)
    assert (found.step, found.total_steps, found.samples_per_second) == (30, 100, 16.0)
    assert found.remaining_s == pytest.approx(35.0)
    assert (found.checkpoint_step, len(found.starts)) == (20, 2)
    page = render_status(found)
    assert "30 of 100 (30.0 %), 35 s of training left" in page
    assert "2 (1 restart)" in page


def test_lines_that_a_crash_has_cut_are_passed_over(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "val/loss": 1}\n{"step": 40, "train/ba')
    assert read_status(run, now=NOW).step == 30


def test_a_run_that_was_killed_has_failed_and_says_what_is_known(run):
    (run / "out.log").open("a").write("T | CRITICAL | rank 1 failed first: killed by signal 9\n")
    (run / "slurm" / "job-7.log").write_text("T | job 7 | stop with 93: crash with code 1, 3 in a row. Not requeued.\n")
    found = read_status(run, now=NOW)
    assert found.state == "failed"
    assert found.detail.startswith("stop with 93: crash with code 1")
    assert "rank 1 failed first: killed by signal 9" in found.detail


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda run: (run / ".no-requeue").touch(), "cancelled"),
        (lambda run: checkpoint(run, 100), "finished"),
        (lambda run: (run / ".requeue.7").write_text('{"signal": "SIGUSR1", "step": 20}'), "stopped"),
        (lambda run: (run / "starts.jsonl").unlink(), "not started"),
    ],
)
def test_every_way_to_stand_still_has_a_name(run, change, state):
    change(run)
    assert read_status(run, now=NOW).state == state


def test_a_run_whose_process_lives_is_running(run):
    with holder(run, then="sys.exit(0)") as process:
        found = read_status(run, now=NOW)
    assert found.state == "running"
    assert f"process {process.pid}" in found.detail


def test_a_waiting_job_is_told_with_its_reason(run, tmp_path):
    answer(tmp_path, "squeue", "echo '7|PENDING|Resources|2||1-00:00:00|2026-01-02T00:00:00'")
    found = read_status(run, now=NOW)
    assert found.state == "waiting"
    assert found.detail == "job 7 is PENDING (Resources), expected to start 2026-01-02T00:00:00"


def test_what_accounting_says_of_a_job_that_has_ended_is_added(run, tmp_path):
    answer(tmp_path, "sacct", "echo '7|CANCELLED by 1000|0:15|2026-01-02T00:00:00'")
    assert read_status(run, now=NOW).detail == "job 7 ended as CANCELLED, exit code 0:15"


def test_a_run_whose_slurm_is_silent_may_wait_or_run(run, tmp_path):
    (run / "starts.jsonl").unlink()
    write_submission(run, {"job_ids": ["7"]})
    assert (read_status(run, now=NOW).state, read_status(run, now=NOW).detail) == ("not started", "")
    answer(tmp_path, "squeue", SILENT)
    assert read_status(run, now=NOW).detail == "SLURM does not answer, so whether a job waits or runs is not known"


def test_a_task_of_an_array_has_the_log_that_lies_with_the_array(run, capsys):
    write_submission(run.with_name("run"), {"job_ids": ["6"], "array": "0-1"})
    (run / "slurm" / "job-7.log").write_text("T | job 6_0 | requeued: stopped by a signal, and saved.\n")
    (run / "slurm" / "job-8.log").write_text("T | job 6_1 | stop with 2: refused. Not requeued.\n")
    first, second = (run.with_name(f"run-{task}") for task in (0, 1))
    for task in (first, second):
        (task / "slurm").mkdir(parents=True)
    (first / "starts.jsonl").write_text((run / "starts.jsonl").read_text())
    (second / "slurm" / "srun.8").touch()  # its preflight fails, so it never starts
    (second / "out.log").touch()
    assert [read_status(first, now=NOW).starts[1].why, script_logs(second)] == [
        "stopped by a signal, and saved.",
        [run / "slurm" / "job-8.log"],
    ]
    assert logs.main([str(second), "--job"]) == 0
    assert "refused" in capsys.readouterr().out


def test_why_a_start_was_made_is_the_batch_scripts_word_if_there_is_one(run):
    assert read_status(run, now=NOW).starts[1].why == "put back by SLURM (node lost), or crashed"
    (run / "slurm" / "job-7.log").write_text(
        "T | job 7 | USR1: ...\nT | job 7 | requeued: stopped by a signal, and saved.\n"
    )
    assert read_status(run, now=NOW).starts[1].why == "stopped by a signal, and saved."


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ({"job": "7", "restart": 1, "after_signal": True}, "stopped by a signal"),
        ({"job": "8", "after_signal": True}, "submitted again, after job 7 that was stopped by a signal"),
        ({"job": None}, "started again, after job 7 that ended without a word"),
    ],
)
def test_without_the_batch_script_the_history_tells_why(run, start, why):
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, **start}) + "\n")
    assert read_status(run, now=NOW).starts[2].why == why


def test_suspected_nodes_are_listed_for_a_day(run):
    record_suspects(run / "bad_nodes.jsonl", [("n7", "hang: rank 3")], time=NOW)
    record_suspects(run / "bad_nodes.jsonl", [("n8", "old")], time=NOW - timedelta(days=2))
    assert read_status(run, now=NOW).suspects == ["n7 (hang: rank 3)"]


def test_jobs_are_found_in_every_place_that_names_them_newest_first(run):
    write_submission(run, {"job_ids": ["5", "6"]})
    assert job_ids(run) == ["7", "6", "5"]
    (run / "submit.json").write_text('{"job')
    assert read_submission(run) == {}


def test_status_of_several_runs_is_a_page_or_a_line_each(run, capsys):
    assert status.main([str(run), str(run), "--json"]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [30, 30]
    assert status.main([str(run)]) == 0
    assert capsys.readouterr().out.count("state ") == 1


@pytest.mark.parametrize("command", [status, logs, cancel])
def test_a_directory_that_is_no_run_is_refused(command, tmp_path, capsys):
    assert command.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert command.main([str(tmp_path)]) == 2
    assert f"{tmp_path} is no run: it has none of submit.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Logs


def test_the_last_lines_of_the_job_and_of_rank_0_are_printed(run, capsys):
    (run / "slurm" / "job-7.log").write_text("one\ntwo\n")
    assert logs.main([str(run), "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert f"==> {run / 'slurm' / 'job-7.log'} <==\ntwo\n" in out
    assert out.endswith(f"==> {run / 'out.log'} <==\nc\n")


def test_one_rank_or_the_job_alone_is_printed_without_headings(run, capsys):
    (run / "slurm" / "rank-00003.log").write_text("of rank 3\n")
    (run / "slurm" / "job-7.log").write_text("of the job\n")
    assert logs.main([str(run), "--rank", "3"]) == 0
    assert logs.main([str(run), "--job"]) == 0
    assert capsys.readouterr().out == "of rank 3\nof the job\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--rank", "9"], "rank 9 has written nothing: there are logs of ranks 0 to 3"), (["--job"], "has no log yet")],
)
def test_a_log_that_is_not_there_is_said_to_be_missing(run, words, message, capsys):
    if words[0] == "--rank":
        assert logs.main([str(run), *words]) == 2
        assert "has no logs by rank: jobs of `clipyard submit` write them" in capsys.readouterr().err
        for rank in (0, 3):
            (run / "slurm" / f"rank-{rank:05d}.log").touch()
    assert logs.main([str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_following_shows_what_is_added_and_files_that_appear_or_begin_anew(run, capsys):
    follower = logs.Follower(logs._finder(run, rank=None, job_only=False), lines=1)
    follower.poll()
    with (run / "out.log").open("a") as file:
        file.write("d\n")
    follower.poll()
    (run / "slurm" / "job-7.log").write_text("job\n")
    (run / "out.log").write_text("new\n")
    follower.poll()
    follower.poll()
    heading = "==> {} <==\n".format
    expected = f"c\nd\n{heading(run / 'slurm' / 'job-7.log')}job\n{heading(run / 'out.log')}new\n"
    assert capsys.readouterr().out == expected


def test_following_ends_in_order_when_it_is_interrupted(run):
    command = [sys.executable, "-m", "training.commands.logs", str(run), "--follow"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == PLAN
        process.send_signal(2)
        assert process.wait(timeout=10) == 0


# Cancel


def test_cancel_asks_the_process_of_this_machine_to_save_and_waits_for_it(run, capsys):
    step = "(run / 'checkpoints' / 'step_00000031')"
    saves = f"{step}.mkdir(); ({step} / 'MANIFEST.json').touch(); sys.exit(0)"
    with holder(run, then=saves) as process:
        assert cancel.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert f"Ended process {process.pid}. Saved at step 31." in out
    assert (run / ".no-requeue").exists()
    assert read_status(run, now=NOW).state == "cancelled"


def test_cancel_of_a_run_that_has_ended_keeps_it_from_starting_again(run, capsys):
    assert cancel.main([str(run)]) == 0
    assert "Nothing was running. The newest checkpoint is that of step 20." in capsys.readouterr().out
    assert (run / ".no-requeue").exists()


def test_cancel_takes_no_job_for_gone_while_slurm_is_silent(run, tmp_path, capsys):
    answer(tmp_path, "squeue", SILENT)
    assert cancel.main([str(run)]) == 1
    said = capsys.readouterr().err
    assert "SLURM does not answer, so whether jobs 7 wait or run is not known: try again in a minute." in said
    assert f"Nothing was ended; {run / '.no-requeue'} is in place" in said
    assert (run / ".no-requeue").exists()


def test_a_job_that_slurm_is_silent_about_after_the_save_is_cancelled(run, tmp_path):
    write_submission(run, {"job_ids": ["7"]})
    row = "7|RUNNING|None|2|n[1-2]|1-00:00:00|N/A"
    answer(tmp_path, "squeue", f"test -e {tmp_path}/asked || {{ echo '{row}'; exit; }}; {SILENT}")
    answer(tmp_path, "scancel", f"touch {tmp_path}/asked; case $* in *USR1*) ;; *) {SILENT};; esac")
    with pytest.raises(RuntimeError, match="jobs 7 could not be cancelled: Unable to contact"):
        cancel_run(run, grace_s=0.1)


@pytest.mark.parametrize(("planned", "grace"), [(None, 300), (120, 300), (900, 900)])
def test_cancel_gives_a_job_as_long_as_submit_has_planned(run, tmp_path, monkeypatch, planned, grace):
    write_submission(run, {"job_ids": ["7"], "array": "0-1", "signal_before_s": planned})
    task = run.with_name("run-0")
    task.mkdir()
    (task / "starts.jsonl").write_text((run / "starts.jsonl").read_text())
    answer(tmp_path, "squeue", "echo '7|RUNNING|None|2|n[1-2]|1-00:00:00|N/A'")
    answer(tmp_path, "scancel", f"echo '#!/bin/sh' > {tmp_path}/bin/squeue")
    said: list[str] = []
    cancel_run(task, grace_s=None, say=said.append)
    assert said == [f"job 7 is asked to save, and has {grace} s for it"]


def test_cancel_of_an_array_forbids_every_task(run):
    write_submission(run, {"job_ids": [], "array": "0-1"})
    tasks = [run.with_name(f"run-{task}") for task in (0, 1)]
    for task in tasks:
        task.mkdir()
    cancel_run(run, grace_s=0)
    assert all((task / ".no-requeue").exists() for task in tasks)
    assert read_status(run, now=NOW).detail.startswith("its runs are run-0, run-1")


def test_jobs_of_an_array_are_asked_to_save_by_the_name_of_the_task_as_well(run):
    write_submission(run, {"job_ids": ["5"], "array": "0-1"})
    assert script_jobs(run.with_name("run-1")) == {"5"}
    assert script_jobs(run.with_name("other-1")) == set()


def test_cancel_says_where_a_run_is_that_it_cannot_reach(run, capsys):
    with holder(run, then="pass"):
        lease = run / "leases" / "00000001.json"
        lease.write_text(json.dumps(json.loads(lease.read_text()) | {"boot": "other", "host": "n9", "machine": "m"}))
        assert cancel.main([str(run)]) == 1
    assert "which cannot be reached from here" in capsys.readouterr().err


def test_cancel_says_what_scancel_refuses(run, tmp_path, capsys):
    answer(tmp_path, "squeue", "echo '7|PENDING|Resources|2||1-00:00:00|N/A'")
    answer(tmp_path, "scancel", "echo 'Access/permission denied' >&2; exit 1")
    assert cancel.main([str(run)]) == 1
    assert "jobs 7 could not be cancelled: Access/permission denied" in capsys.readouterr().err
    answer(tmp_path, "squeue", "echo '7|RUNNING|None|2|n[1-2]|1-00:00:00|N/A'")
    write_submission(run, {"job_ids": ["7"]})
    assert cancel.main([str(run)]) == 1
    assert "jobs 7 could not be signalled: Access/permission denied" in capsys.readouterr().err


def test_cancel_gives_up_on_a_process_that_does_not_end(run, monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter(range(0, 100_000, 50)).__next__)
    with holder(run, then="pass") as process, pytest.raises(RuntimeError, match=f"process {process.pid} .* not ended"):
        cancel_run(run, grace_s=0)
