"""Evaluates a model during training: builds the evaluations of a run at start-up and runs those that are due.

build_evaluators(config) -> [Evaluator, ...]        once; ends the run if a data set is not as it should be
evaluate(model, evaluators, epoch=...) -> metrics   after an epoch, on all ranks, the same numbers on each
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from models.config import PreprocessConfig
from training.config import DataConfig, EvaluationConfig
from training.data.transforms import build_eval_transform
from training.distributed.sharding import reshard, shard_group
from training.evaluation.batches import Loading
from training.evaluation.datasets import (
    open_classification_set,
    open_imagenet,
    open_imagenet_v2,
    open_retrieval_set,
    open_validation_pairs,
    split_directories,
)
from training.evaluation.encoder import Encoder, ShardedEncoder, TwoTowers
from training.evaluation.evaluators import (
    Evaluator,
    LabelledSource,
    RetrievalEvaluator,
    ValidationEvaluator,
    ZeroShotEvaluator,
)
from training.evaluation.prompts import imagenet_prompts
from training.evaluation.zero_shot import Tokenizer

logger = logging.getLogger(__name__)

_MAX_FORWARD_SAMPLES = 256
"""Samples per forward pass: enough to fill a GPU, and small sets spread over more loader processes."""
_OPENCLIP_ACCURACY = ("top1", "top5")
_SET_ACCURACY = ("top1", "top5", "mean_per_class_recall")


def due(epoch: int, frequency: int, *, last: bool) -> bool:
    """Whether an evaluation runs after ``epoch`` completed epochs: after every n-th, and after the last; 0 is never."""
    return frequency > 0 and (last or epoch % frequency == 0)


def build_evaluators(
    config: EvaluationConfig,
    data: DataConfig,
    *,
    preprocess: PreprocessConfig,
    tokenizer: Tokenizer,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[Evaluator]:
    """Opens and checks every data set of ``config``. Collective: all ranks.

    Raises:
        ValueError: a path, a set's layout, a label or a template is wrong; on every rank.
    """
    loading = Loading(
        transform=build_eval_transform(preprocess),
        tokenizer=tokenizer,
        batch_size=min(data.batch_size, _MAX_FORWARD_SAMPLES),
        workers=data.workers,
        rank=rank,
        world_size=world_size,
        pin_memory=device.type == "cuda",
        max_image_pixels=data.max_image_pixels,
    )
    evaluators: list[Evaluator] = []
    if config.zeroshot_frequency:
        evaluators += _zero_shot_evaluators(config, loading)
        evaluators += _retrieval_evaluators(config, loading)
    if data.val_data and config.val_frequency:
        evaluators.append(
            ValidationEvaluator(
                frequency=config.val_frequency,
                source=open_validation_pairs(data, rank=rank, world_size=world_size),
                loading=loading,
                loss_batch_size=data.batch_size,
                chunk_size=config.val_retrieval_chunk_size,
            )
        )
    return evaluators


def _zero_shot_evaluators(config: EvaluationConfig, loading: Loading) -> list[Evaluator]:
    evaluators: list[Evaluator] = []
    prompts = imagenet_prompts()
    num_classes = len(prompts.class_names)
    imagenet: list[LabelledSource] = []
    if config.imagenet_val:
        source = open_imagenet(config.imagenet_val, num_classes=num_classes, rank=loading.rank)
        imagenet.append(LabelledSource("imagenet-zeroshot-val-", source, _OPENCLIP_ACCURACY))
    if config.imagenet_v2:
        source = open_imagenet_v2(config.imagenet_v2, num_classes=num_classes, rank=loading.rank)
        imagenet.append(LabelledSource("imagenetv2-zeroshot-val-", source, _OPENCLIP_ACCURACY))
    if imagenet:
        evaluators.append(ZeroShotEvaluator(config.zeroshot_frequency, prompts, imagenet, loading))
    for directory in split_directories(config.zeroshot_data, flag="--zeroshot-data"):
        found = open_classification_set(directory, rank=loading.rank, world_size=loading.world_size)
        labelled = LabelledSource(f"{found.name}-zeroshot-", found.source, _SET_ACCURACY)
        evaluators.append(ZeroShotEvaluator(config.zeroshot_frequency, found.prompts, [labelled], loading))
    return evaluators


def _retrieval_evaluators(config: EvaluationConfig, loading: Loading) -> list[Evaluator]:
    evaluators: list[Evaluator] = []
    for directory in split_directories(config.retrieval_data, flag="--retrieval-data"):
        found = open_retrieval_set(directory, rank=loading.rank, world_size=loading.world_size)
        evaluators.append(
            RetrievalEvaluator(
                frequency=config.zeroshot_frequency,
                name=found.name,
                source=found.source,
                loading=loading,
                chunk_size=config.val_retrieval_chunk_size,
            )
        )
    return evaluators


def evaluate(
    model: nn.Module,
    evaluators: Sequence[Evaluator],
    *,
    epoch: int,
    last: bool,
    preprocess: PreprocessConfig,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    input_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Runs what is due after ``epoch`` and returns all metrics, the same on every rank. Collective: all ranks.

    Args:
        model: not wrapped for data parallelism; its train and eval flags are left as they were.
        last: whether this is the run's last epoch, after which everything with a frequency is evaluated.
        autocast: makes the precision context that the towers run in.
        input_dtype: dtype of the images that the model takes.

    Returns:
        Empty when nothing is due.
    """
    metrics: dict[str, float] = {}
    towers = cast(TwoTowers, model)
    is_sharded = shard_group(model) is not None
    kind = ShardedEncoder if is_sharded else Encoder
    encoder = kind(towers, preprocess, device=device, autocast=autocast, input_dtype=input_dtype)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # FSDP keeps what it allocates at the first pass, and a tensor made in inference mode cannot train later.
        with torch.no_grad() if is_sharded else torch.inference_mode():
            reshard(model)
            for evaluator in evaluators:
                if due(epoch, evaluator.frequency, last=last):
                    start = time.perf_counter()
                    result = evaluator.run(encoder, epoch=epoch)  # collective: all ranks
                    metrics |= result
                    logger.debug("Evaluated %s in %.1f s.", ", ".join(result), time.perf_counter() - start)
    finally:
        reshard(model)
        # Each module's own flag: frozen parts may have been in eval mode while the rest trained.
        for module, training in was_training.items():
            module.training = training
    return metrics
