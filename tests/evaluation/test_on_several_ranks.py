"""Evaluation on several gloo processes: the numbers of a single one, equal on all ranks, errors on all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.config import parse_model_config
from models.factory import build_model
from models.weights import load_weights
from tests.distributed.launch import current_runtime, run_ranks
from tests.evaluation.builders import (
    CLASS_NAMES,
    PREPROCESS,
    TEMPLATES,
    loading,
    tiny_clip,
    tokenizer,
    write_class_folders,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)
from training.config import DataConfig, EngineConfig, EvaluationConfig
from training.distributed.collectives import rank, world_size
from training.distributed.parallelize import parallelize
from training.evaluation.datasets import open_imagenet
from training.evaluation.evaluate import build_evaluators, evaluate
from training.evaluation.evaluators import LabelledSource, ZeroShotEvaluator
from training.evaluation.prompts import Prompts

CPU = torch.device("cpu")


def evaluate_everything(
    directory: Path, *, piped: bool = False, model: torch.nn.Module | None = None
) -> dict[str, float]:
    """What each rank does: opens all sets under ``directory`` and evaluates a model that is the same everywhere."""
    pairs = f"{directory}/pairs/test/{{0..2}}.tar"
    evaluation = EvaluationConfig(
        zeroshot_data=str(directory / "zoo"), retrieval_data=str(directory / "flickr"), val_retrieval_chunk_size=6
    )
    data = DataConfig(val_data=f"pipe:cat {pairs}" if piped else pairs, batch_size=4, workers=0)
    evaluators = build_evaluators(
        evaluation,
        data,
        preprocess=PREPROCESS,
        tokenizer=tokenizer(),
        rank=rank(),
        world_size=world_size(),
        device=CPU,
    )
    evaluators.append(folders_evaluator(directory / "folders"))
    return evaluate(model or tiny_clip(), evaluators, epoch=2, last=False, preprocess=PREPROCESS, device=CPU)


def folders_evaluator(directory: Path) -> ZeroShotEvaluator:
    """Three classes with one image each: fewer of both than there may be ranks."""
    source = open_imagenet(str(directory), num_classes=3, rank=rank())
    sets = [LabelledSource("imagenet-zeroshot-val-", source, ("top1", "top5"))]
    share = loading(rank=rank(), world_size=world_size())
    return ZeroShotEvaluator(1, Prompts(CLASS_NAMES[:3], TEMPLATES), sets, share)


def evaluate_indexed_and_piped(directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    return evaluate_everything(directory), evaluate_everything(directory, piped=True)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sets")
    write_classification_set(directory / "zoo")
    write_retrieval_set(directory / "flickr")
    write_pairs(directory / "pairs", shards=3)
    write_class_folders(directory / "folders", CLASS_NAMES[:3])
    return directory


@pytest.fixture(scope="module")
def alone(sets: Path) -> dict[str, float]:
    """The metrics of a single process."""
    return evaluate_everything(sets)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_returns_the_metrics_of_a_single_process(
    sets: Path, alone: dict[str, float], num_ranks: int
) -> None:
    """With four ranks, one has no class and no image of the folders."""
    results = run_ranks(num_ranks, evaluate_indexed_and_piped, sets)
    assert all(result == results[0] for result in results)
    for metrics in results[0]:
        assert metrics == pytest.approx(alone, abs=1e-6)
    assert len(alone) == 12 + 1 + 3 + 6 + 1


def evaluate_a_sharded_model(directory: Path) -> tuple[dict[str, float], bool]:
    """The metrics, and whether the model still trains after its very first forward pass was an evaluation."""
    given = tiny_clip()
    vision = {"image_size": PREPROCESS.size[0], "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": given.context_length, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = build_model(parse_model_config({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, name="tiny"))
    load_weights(model, given.state_dict())
    parallelize(model, config=EngineConfig(device="cpu", fsdp=True), runtime=current_runtime())
    metrics = evaluate_everything(directory, model=model)
    images = torch.zeros(1, 3, *PREPROCESS.size)
    model(images, torch.zeros(1, model.context_length, dtype=torch.int64)).image_features[0, 0].backward()
    return metrics, all(parameter.grad is not None for parameter in model.visual.parameters())


def test_ranks_with_fewer_batches_run_along_with_a_sharded_model(sets: Path, alone: dict[str, float]) -> None:
    """With four ranks, one has no class and no image of the folders, and piped sets end at different times."""
    for metrics, trains in run_ranks(4, evaluate_a_sharded_model, sets):
        assert metrics == pytest.approx(alone, abs=1e-6)
        assert trains


def start_up_errors(directories: list[Path]) -> list[str]:
    messages = []
    for directory in directories:
        try:
            evaluate_everything(directory)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_only_one_rank_sees_fails_the_start_of_all(tmp_path: Path) -> None:
    """Rank 1 alone reads the second shard, rank 0 alone looks for the directory."""
    directory = write_classification_set(tmp_path / "cut" / "zoo")
    shard = directory / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    missing = tmp_path / "missing"
    messages = run_ranks(2, start_up_errors, [tmp_path / "cut", missing])
    assert messages[0] == messages[1]
    assert f"Shard '{shard}' is damaged" in messages[0][0]
    assert messages[0][1:] == [f"Evaluation set: directory '{missing}/zoo' does not exist: correct --zeroshot-data."]
