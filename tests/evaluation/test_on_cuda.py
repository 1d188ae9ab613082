"""Evaluation on a GPU gives the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.evaluation.builders import (
    PREPROCESS,
    tiny_clip,
    tokenizer,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)
from training.config import DataConfig, EvaluationConfig
from training.evaluation.evaluate import build_evaluators, evaluate


def metrics_on(device: torch.device, directory: Path) -> dict[str, float]:
    config = EvaluationConfig(zeroshot_data=str(directory / "zoo"), retrieval_data=str(directory / "flickr"))
    data = DataConfig(val_data=f"{directory}/pairs/test/{{0..1}}.tar", batch_size=4, workers=2)
    evaluators = build_evaluators(
        config, data, preprocess=PREPROCESS, tokenizer=tokenizer(), rank=0, world_size=1, device=device
    )
    model = tiny_clip().to(device)
    return evaluate(model, evaluators, epoch=2, last=False, preprocess=PREPROCESS, device=device)


@pytest.mark.gpu
def test_metrics_on_the_gpu_equal_those_on_the_cpu(tmp_path: Path) -> None:
    write_classification_set(tmp_path / "zoo")
    write_retrieval_set(tmp_path / "flickr")
    write_pairs(tmp_path / "pairs")
    on_gpu, on_cpu = (metrics_on(torch.device(name), tmp_path) for name in ("cuda", "cpu"))
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)
