"""All models with one command: a plan that fits, failures that do not end it, and a page that claims nothing more."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import train_step_all
from benchmarks.scale_report import fill
from benchmarks.train_step import parse_arguments, result_name
from benchmarks.train_step_all import CPU, GPU, LIMIT_S, Entry, Outcome, main, run_all, run_entry
from benchmarks.train_step_report import PAGE, TARGETS, tables

QUICK = ("--device=cpu", "--no-memory", "--blocks=2", "--batches=1")


def test_the_plan_for_a_gpu_fits_into_eight_minutes_and_has_every_target(capsys):
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert int(printed.splitlines()[-1].split()[0]) <= LIMIT_S == 8 * 60
    assert {(entry.model, entry.batch_size) for entry in GPU} == {target[:2] for target in TARGETS}
    assert all(entry.model in printed for entry in GPU)
    assert all("--least-steps=30" in entry.options and "--torchcompile" in entry.flags for entry in GPU)


def test_all_arms_are_measured_where_time_does_not_matter(capsys):
    main(["--dry-run", "--arms", "all", "--only", "ViT-L-14"])
    (line, _) = capsys.readouterr().out.splitlines()
    assert "open_clip, open_clip_tuned, open_clip_checkpointed" in line


def test_a_model_that_the_suite_does_not_have_is_refused():
    with pytest.raises(ValueError, match="--only ViT-B-33: the suite has ViT-B-16"):
        main(["--dry-run", "--only", "ViT-B-33"])


def test_one_failing_model_fails_the_command_after_the_others(tmp_path, monkeypatch, capsys):
    entries = (Entry("no-such-model", 4, 60, options=QUICK), Entry("demo-vit", 4, 120, options=QUICK))
    monkeypatch.setitem(train_step_all.SUITES, "cpu", entries)
    assert main(["--suite", "cpu", "--results", str(tmp_path)]) == 1
    failed, measured = json.loads((tmp_path / "train_step_suite_cpu.json").read_text())["outcomes"]
    assert (failed["status"], measured["status"]) == ("failed", "measured")
    assert "exit code 1: ValueError: unknown model 'no-such-model'" in failed["message"]
    assert "ratio" in json.loads((tmp_path / measured["file"]).read_text())["comparisons"]["open_clip"]
    assert measured["message"].startswith("open_clip ")
    assert measured["message"].endswith(" by processor time")
    assert "no-such-model      failed" in capsys.readouterr().out


def test_a_slow_cpu_is_no_failure_and_a_slow_gpu_is():
    assert [train_step_all.failures(suite) for suite in ("cpu", "gpu")] == [("failed",), ("failed", "stopped")]


def test_a_process_that_takes_too_long_is_ended(tmp_path):
    outcome = run_entry(Entry("demo-vit", 4, 1, options=QUICK), 1.0, tmp_path)
    assert outcome.status == "stopped"
    assert outcome.message.startswith("not done after 1 s")


def test_time_that_a_model_leaves_over_is_the_next_ones():
    clock = iter([0.0, 30.0, 200.0]).__next__
    given: list[float] = []

    def run(entry: Entry, seconds: float) -> Outcome:
        given.append(seconds)
        return Outcome(entry.model, 1, (), "measured", 0.0, "", "")

    entries = [Entry("a", 1, 100), Entry("b", 1, 50), Entry("c", 1, 60, needs_s=90)]
    outcomes = run_all(entries, run, started=0.0, clock=clock)
    assert given == [110.0, 130.0]
    assert outcomes[-1].status == "skipped"
    assert outcomes[-1].message == "20 s are left, and it needs 90"


def test_models_of_the_cpu_suite_share_flops_between_towers_as_their_large_ones_do():
    assert [entry.model for entry in CPU] == [train_step_all.NARROW.format(name) for name in ("ViT-B-32", "convnext")]


RUN = {"hardware": {"gpu": "NVIDIA H200"}, "versions": {"open_clip_torch": "3.3.0"}}


def _result(**changes):
    ratio = {"value": 1.7, "low": 1.6, "high": 1.8}
    arm = {"samples_per_s": 1e4, "mfu_useful": 0.5, "steps": 30, "peak_gib": 20.0}
    return {
        "settings": {"model": "ViT-B-32", "precision": "amp_bf16", "batch_size": 896, "full_length": False}
        | {"flags": ["--torchcompile"]},
        "world_size": 1,
        "caption_tokens": {"mean": 15.5},
        "text_tokens": {"saved_pct": 79.0},
        "run": {
            "commit": "0123456789abcdef",
            "hardware": {"gpu": "NVIDIA H200"},
            "versions": {"open_clip_torch": "3.3.0"},
        },
        "comparisons": {"open_clip": {"ratio": ratio, "arms": {"clipyard": arm, "open_clip": arm}}},
        **changes,
    }


def test_the_page_puts_what_was_measured_beside_the_target(tmp_path):
    (tmp_path / "train_step_x.json").write_text(json.dumps(_result()))
    filled = tables(tmp_path)
    assert (
        "| ViT-B-32 | 896 | 1.70 [1.60, 1.80], 3.3.0 (2.1) |  | not measured (1.7 / 1.95) | 50.0 % (56 %) |"
        in filled["gpu"]
    )
    assert "- ViT-B-32, batch 896: against open_clip_tuned, open_clip with all captions full" in filled["unmeasured"]
    assert "`train_step_x.json`, 0123456789" in filled["arms"]


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        ({"void": "losses drift"}, "void: losses drift"),
        ({"out_of_memory": {"open_clip": "x"}}, "out of memory: open_clip"),
    ],
)
def test_the_page_says_why_there_is_no_ratio(tmp_path, comparison, said):
    (tmp_path / "train_step_x.json").write_text(json.dumps(_result(comparisons={"open_clip": comparison})))
    assert f"| {said}, 3.3.0 (2.1) |" in tables(tmp_path)["gpu"]


@pytest.mark.parametrize(
    "changes",
    [
        {"run": RUN | {"commit": None, "hardware": {"gpu": "NVIDIA A100"}}},
        {"settings": _result()["settings"] | {"precision": "fp32"}},
        {"settings": _result()["settings"] | {"flags": ["--torchcompile", "--fp8=on"]}},
        {"comparisons": {"open_clip": {"unfinished": "ended before two blocks were measured"}}},
    ],
)
def test_another_gpu_precision_or_flag_and_half_a_measurement_speak_of_no_target(tmp_path, changes):
    (tmp_path / "train_step_x.json").write_text(json.dumps(_result(**changes)))
    assert "| ViT-B-32 | 896 | not measured (2.1)" in tables(tmp_path)["gpu"]


def test_an_older_runs_file_is_not_named_as_this_ones(tmp_path):
    entry = Entry("demo-vit", 4, 1, options=QUICK)
    name = f"{result_name(parse_arguments(entry.words()))}.json"
    (tmp_path / name).write_text("{}")
    os.utime(tmp_path / name, (0, 0))
    assert run_entry(entry, 1.0, tmp_path).file == ""


def test_a_cpu_says_nothing_about_a_target(tmp_path):
    cpu = {"commit": None, "hardware": {"cpu": "a CPU", "threads": 2}}
    (tmp_path / "train_step_x.json").write_text(json.dumps(_result(run=cpu)))
    assert "1.70" not in tables(tmp_path)["gpu"]
    assert "a CPU, 2 threads" in tables(tmp_path)["arms"]


def test_the_page_is_that_of_the_results():
    text = PAGE.read_text()
    assert fill(text, tables()) == text
