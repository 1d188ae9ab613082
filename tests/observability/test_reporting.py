from __future__ import annotations

import io
import json
import logging
import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.observability.console import ProgressLine, set_up_logging
from training.observability.metrics import Countdown, RunningMean, StepClock, format_duration
from training.observability.reporter import Reporter, Standing
from training.observability.sinks import JsonLinesSink, MetricSink, TensorBoardSink, append_result, evaluated_epochs

METRICS = {
    "loss": 2.5,
    "contrastive_loss": 2.5,
    "logit_scale": 14.3,
    "lr": 1e-3,
    "data_time": 0.01,
    "batch_time": 0.1,
    "samples_per_second": 640.0,
    "samples_per_second_per_gpu": 320.0,
}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _reporter(sinks: list[MetricSink], *, stream: io.StringIO | None = None, results: Path | None = None) -> Reporter:
    return Reporter(
        sinks=sinks,
        progress=ProgressLine(stream or io.StringIO()),
        results_path=results,
        samples_per_epoch=640,
    )


def _standing(step: int) -> Standing:
    """Of steps of 64 samples, 10 an epoch, 20 in all."""
    epoch, place = divmod(step, 10)
    samples = 64 * (place + 1)
    return Standing(epoch, samples, samples / 640, place == 0, steps_done=step + 1, total_steps=20, left=19 - step)


def test_throughput_is_that_of_the_window() -> None:
    clock = StepClock()
    for _ in range(4):
        time.sleep(0.01)
        clock.add_step(data_wait_s=0.005)
    numbers = clock.read(samples_per_step=8, world_size=2)
    assert numbers["samples_per_second"] == pytest.approx(8 / numbers["batch_time"])
    assert numbers["samples_per_second_per_gpu"] == numbers["samples_per_second"] / 2
    assert numbers["data_time"] == pytest.approx(0.005)
    assert 0 < numbers["data_wait_pct"] <= 50


def test_the_log_line_has_open_clips_form(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reporter = _reporter([])
    reporter.step(12, METRICS, standing=_standing(12), log_line=True)
    assert caplog.messages[0].startswith("Train Epoch: 1 [192/640 (30%)] Data (t): 0.010 Batch (t): 0.100, 640.000/s")
    assert (
        "LR: 0.001000 Logit Scale: 14.300 Contrastive_loss: 2.5000 (2.5000) Loss: 2.5000 (2.5000) ETA 0:00"
        in caplog.text
    )


def test_the_log_line_ends_with_the_slowest_rank(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slowest = {"rank": 3.0, "score": 0.5, "compute_seconds": 0.2, "data_wait_seconds": 0.01, "others_seconds": 0.1}
    metrics = METRICS | {f"straggler/{name}": value for name, value in slowest.items()}
    _reporter([]).step(12, metrics, standing=_standing(12), log_line=True)
    assert caplog.messages[0].endswith("Slowest: rank 3 (compute 0.200 s, data 0.010 s, others 0.100 s)")


def test_tensorboard_has_open_clips_tags_at_their_steps(tmp_path: Path) -> None:
    reporter = _reporter([TensorBoardSink(tmp_path, first_step=0)])
    reporter.step(3, METRICS, standing=_standing(3), log_line=False)
    reporter.evaluation(10, {"epoch": 1, "clip_val_loss": 1.5}, epoch=1)
    reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in METRICS} | {"val/clip_val_loss"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/clip_val_loss")] == [(1, 1.5)]


def test_a_resumed_run_drops_what_the_crashed_part_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path, first_step=0)
    for step in range(5):
        sink.write(step, {"train/loss": float(step)})
    sink.write(3, {"val/loss": 0.5}, epoch=1)
    sink.close()
    path.open("a").write('{"step": 5, "trai')  # the crash
    JsonLinesSink(path, first_step=3).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1] == {"step": 3, "epoch": 1, "val/loss": 0.5}


def test_evaluations_are_appended_and_remembered(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    _reporter([], results=path).evaluation(10, {"epoch": 1, "clip_val_loss": 1.5}, epoch=1)
    append_result(path, {"epoch": 2})
    assert json.loads(path.read_text().splitlines()[0]) == {"epoch": 1, "clip_val_loss": 1.5}
    assert evaluated_epochs(path) == {1, 2}
    assert evaluated_epochs(tmp_path / "none") == set()


def test_the_progress_line_is_drawn_in_terminals_only() -> None:
    terminal, pipe = _Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = ProgressLine(stream)
        progress.show(step=5, total_steps=10, samples_per_second=99.6, loss=1.0, remaining_s=61)
        progress.clear()
    assert "5/10 steps  100 samples/s  loss 1.000  ETA 0:01:01" in terminal.getvalue()
    assert pipe.getvalue() == ""


def test_other_ranks_show_warnings_only_and_say_who_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        set_up_logging(path=tmp_path / "out.log", debug=False, rank=3, on_screen=False)
        logging.getLogger("x").info("quiet")
        logging.getLogger("x").warning("loud")
        assert "rank 3 | " in (shown := capsys.readouterr().err)
        assert "loud" in shown
        assert "quiet" not in shown
        assert "quiet" in (tmp_path / "out.log").read_text()
    finally:
        root.handlers[:] = before


def test_the_time_left_follows_the_recent_rate() -> None:
    countdown = Countdown()
    assert countdown.remaining_s(99, step_s=4.0) == pytest.approx(4.0 * 99)
    assert countdown.remaining_s(89, step_s=1.0) == pytest.approx(3.4 * 89)
    for _ in range(30):
        remaining = countdown.remaining_s(50, step_s=1.0)
    assert remaining == pytest.approx(50, rel=0.01)


def test_small_numbers() -> None:
    mean = RunningMean()
    assert mean.mean == 0.0
    mean.add(1.0)
    mean.add(2.0)
    assert mean.mean == 1.5
    assert format_duration(3725.4) == "1:02:05"


def test_a_full_disk_costs_numbers_and_not_the_run(tmp_path, caplog):
    """/dev/full takes the open file's place: every write fails as on a full disk."""
    sink = JsonLinesSink(tmp_path / "metrics.jsonl", first_step=0)
    sink.write(0, {"train/loss": 1.0})
    whole = os.dup(sink._file.fileno())
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, sink._file.fileno())
    reporter = Reporter(
        sinks=[sink],
        detail_sinks=[sink],
        progress=ProgressLine(io.StringIO()),
        results_path=tmp_path / "gone" / "results.jsonl",
        samples_per_epoch=10,
    )
    reporter.scalars(1, {"guard/skipped": 1.0})
    reporter.evaluation(1, {"clip_val_loss": 1.0}, epoch=1)
    os.dup2(whole, sink._file.fileno())
    reporter.scalars(2, {"guard/skipped": 2.0})
    reporter.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line]
    assert [line["step"] for line in lines] == [0, 2]
    assert "Metrics cannot be written" in caplog.text
