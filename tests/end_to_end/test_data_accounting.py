"""What a run reports of its data, and when bad data end it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.end_to_end.conftest import Outcome
from tests.factories import jpeg_bytes, write_shards, write_tar

Run = Callable[[Sequence[str]], Outcome]


def _line(tmp_path: Path, model: str, data: str, *more: str) -> list[str]:
    flags = (
        "--precision fp32 --device cpu --epochs 1 --workers 1 --warmup 1 --name r --report-to tensorboard "
        "--log-every-n-steps 1 --log-metric-every-n-steps 1"
    )
    return [*flags.split(), "--train-data", data, "--model", model, "--logs", str(tmp_path / "logs"), *more]


def _metrics(tmp_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / "logs/r/metrics.jsonl").read_text().splitlines()]


def test_samples_and_loss_are_reported_by_source(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    first = write_shards(tmp_path / "first", shards=2, samples=16)
    second = write_shards(tmp_path / "second", shards=1, samples=16)
    outcome = run_here(_line(tmp_path, tiny_model, f"{first}::{second}", "--batch-size", "8"))
    assert outcome.code == 0, outcome.text
    last = _metrics(tmp_path)[-1]
    assert last["train/data/read"] == 48
    assert (last[f"train/data/source/{first}"], last[f"train/data/source/{second}"]) == (32, 16)
    assert last[f"train/data/source_loss/{second}"] > 0
    assert last["train/data/gb_read"] > 0
    events = EventAccumulator(str(tmp_path / "logs/r/tensorboard")).Reload()
    assert "train/data/read" in events.Tags()["scalars"]


def test_bad_samples_beyond_the_budget_end_the_run_with_code_94_and_name_the_worst_shard(
    run_here: Run, tmp_path: Path, tiny_model: str
) -> None:
    good = {"jpg": jpeg_bytes(), "txt": b"a caption"}
    write_tar(tmp_path / "good.tar", [(f"{i}", good) for i in range(900)])
    write_tar(tmp_path / "bad.tar", [(f"{i}", good | {"jpg": b"no image"} if i // 4 % 2 else good) for i in range(900)])
    data = f"{tmp_path}/{{good,bad}}.tar"
    line = _line(tmp_path, tiny_model, data, "--batch-size", "64", "--train-num-samples", "1800")
    outcome = run_here(line)
    assert outcome.code == 94
    assert "more than --max-bad-samples 0.1 allows: {'broken_image':" in outcome.text
    assert f"Worst shards: {tmp_path}/bad.tar (" in outcome.text
    outcome = run_here([*line, "--max-bad-samples", "0.5", "--resume", "latest"])
    assert outcome.code == 0, outcome.text
    assert 0.2 < _metrics(tmp_path)[-1]["train/data/bad_fraction"] < 0.4


def test_a_manifest_with_a_schedule_trains(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    write_shards(tmp_path / "a", shards=2, samples=16)
    write_shards(tmp_path / "b", shards=2, samples=16)
    (tmp_path / "sources.yaml").write_text(
        "sources:\n"
        "  - {name: replay, shards: 'a/{000..001}.tar', weight: [[0, 1], [0.5, 0]]}\n"
        "  - {name: fresh, shards: 'b/{000..001}.tar', weight: [[0, 0], [0.5, 1]]}\n"
    )
    line = _line(tmp_path, tiny_model, "unused", "--batch-size", "8", "--dataset-resampled", "--epochs", "4")
    line[line.index("--train-data") : line.index("--train-data") + 2] = [
        "--train-data-manifest",
        str(tmp_path / "sources.yaml"),
    ]
    outcome = run_here(line)
    assert outcome.code == 0, outcome.text
    first, last = _metrics(tmp_path)[0], _metrics(tmp_path)[-1]
    assert last["train/data/source/fresh"] > last["train/data/source/replay"]
    assert first["train/data/source/replay"] > 0


def test_json_lines_with_several_captions_train(run_here: Run, tmp_path: Path, tiny_model: str) -> None:
    rows = []
    for row in range(24):
        (tmp_path / f"{row}.jpg").write_bytes(jpeg_bytes((row, 90, 90)))
        rows.append(json.dumps({"image_path": f"{row}.jpg", "caption": [f"picture {row}", f"image number {row}"]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    outcome = run_here(_line(tmp_path, tiny_model, str(tmp_path / "rows.jsonl"), "--batch-size", "8"))
    assert outcome.code == 0, outcome.text
    assert _metrics(tmp_path)[-1]["train/data/read"] == 24
