"""Training and validation data on S3: the training process reads a little, its loader processes the rest."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.conftest import run_ranks_to_end
from tests.factories import write_shards
from tests.s3.client import Bucket
from tests.s3.server import Fault


def test_a_run_trains_and_validates_from_s3_alone(s3: Bucket, tmp_path: Path, tiny_model: str) -> None:
    write_shards(tmp_path / "shards", shards=3, samples=16)
    s3.upload_directory(tmp_path / "shards")
    flags = (
        "--device cpu --precision fp32 --epochs 2 --batch-size 8 --workers 2 --warmup 1 --name r --val-frequency 1 "
        f"--train-data {s3.url('{000..001}.tar')} --val-data {s3.url('002.tar')} --val-num-samples 16 "
        f"--cache-shards {tmp_path}/cache --cache-gib 1"
    )
    line = [*flags.split(), "--model", tiny_model, "--logs", str(tmp_path / "logs")]
    (outcome,) = run_ranks_to_end(line, world_size=1)
    assert outcome.code == 0, outcome.text
    results = [json.loads(text) for text in (tmp_path / "logs/r/checkpoints/results.jsonl").read_text().splitlines()]
    assert [result["epoch"] for result in results] == [1, 2]
    metrics = [json.loads(text) for text in (tmp_path / "logs/r/metrics.jsonl").read_text().splitlines()]
    last = [entry for entry in metrics if "train/data/read" in entry][-1]
    assert last["train/data/read"] == 64
    assert last["train/data/gb_read"] > 0


def test_a_run_whose_credentials_are_wrong_ends_at_once_with_the_reason(
    s3: Bucket, tmp_path: Path, tiny_model: str
) -> None:
    write_shards(tmp_path / "shards", shards=1, samples=16)
    s3.upload_directory(tmp_path / "shards")
    s3.faults("000.tar", Fault(status=403))
    flags = (
        f"--device cpu --precision fp32 --epochs 1 --batch-size 8 --name r --train-data {s3.url('000.tar')} "
        "--train-num-samples 16"
    )
    line = [*flags.split(), "--model", tiny_model, "--logs", str(tmp_path / "logs")]
    (outcome,) = run_ranks_to_end(line, world_size=1, timeout_s=60)
    assert outcome.code == 2
    assert "AWS_ACCESS_KEY_ID" in outcome.text
    assert "Traceback" not in outcome.text
