"""The evaluations of a run: zero-shot classification, validation pairs, retrieval sets. All ranks share the work.

    samples --(dealt over ranks)--> features --(gathered, in the set's order)--> metrics, equal on all ranks

N images, C captions, M classes, E embedding, W ranks. Every ``run`` here is collective: all ranks, in step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distributed.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from training.evaluation.batches import Loading, evaluation_batches
from training.evaluation.encoder import Encoder
from training.evaluation.exact import exact_products
from training.evaluation.prompts import Prompts
from training.evaluation.retrieval import benchmark_metrics, openclip_metrics, positive_ranks
from training.evaluation.samples import SampleSource
from training.evaluation.zero_shot import accuracy, class_weights, count_hits, label_ranks, tokenize_prompts

logger = logging.getLogger(__name__)

_PROMPTS_PER_FORWARD = 512


class Evaluator(Protocol):
    """One evaluation that is due every ``frequency`` epochs."""

    @property
    def frequency(self) -> int:
        """Epochs between evaluations; 0 is never."""

    def run(self, encoder: Encoder, *, epoch: int) -> dict[str, float]:
        """The metrics, the same on every rank. Collective: all ranks."""


class LabelledSource(NamedTuple):
    """A labelled set, what its metrics begin with, and which of top1, top5, mean_per_class_recall are reported."""

    prefix: str
    source: SampleSource
    reported: tuple[str, ...]


@dataclass
class ZeroShotEvaluator:
    """Classification by prompts. Sets with the same classes (ImageNet and its V2) share one classifier."""

    frequency: int
    prompts: Prompts
    sets: Sequence[LabelledSource]
    loading: Loading
    _tokens: Tensor | None = field(default=None, init=False)

    def run(self, encoder: Encoder, *, epoch: int) -> dict[str, float]:
        weights = self._classifier(encoder)
        metrics: dict[str, float] = {}
        for prefix, source, reported in self.sets:
            result = accuracy(self._count(encoder, weights, source))
            metrics |= {f"{prefix}{name}": result[name] for name in reported if name in result}
        return metrics

    def _classifier(self, encoder: Encoder) -> Tensor:
        """[M, E]: each rank encodes the prompts of its stretch of classes."""
        num_classes, loading = len(self.prompts.class_names), self.loading
        mine = range(
            loading.rank * num_classes // loading.world_size, (loading.rank + 1) * num_classes // loading.world_size
        )
        if self._tokens is None:
            # The tokens never change. A rank without a class encodes class 0 all the same, to know E.
            self._tokens = tokenize_prompts(self.prompts, loading.tokenizer, classes=mine or range(1))
        with encoder.in_step():
            weights = class_weights(self._tokens, encoder.texts, prompts_per_forward=_PROMPTS_PER_FORWARD)
        return all_gather_rows(weights[: len(mine)])  # collective: all ranks

    def _count(self, encoder: Encoder, weights: Tensor, source: SampleSource) -> Tensor:
        """Hits per class over all ranks, int64 [3, M]."""
        counts = torch.zeros(3, len(weights), dtype=torch.int64, device=encoder.device)
        with encoder.in_step():
            for batch in evaluation_batches(source, self.loading):
                labels = batch.labels.to(encoder.device, non_blocking=True)
                ranks = label_ranks(encoder.images(batch.images), weights, labels)
                counts += count_hits(ranks, labels, num_classes=len(weights))
        counts = all_reduce_sum(counts)  # collective: all ranks
        _require_complete(int(counts[0].sum()), source)  # host sync
        return counts


@dataclass(frozen=True)
class ValidationEvaluator:
    """``clip_val_loss`` and retrieval among the validation pairs, under OpenCLIP's names."""

    frequency: int
    source: SampleSource
    loading: Loading
    loss_batch_size: int
    chunk_size: int

    def run(self, encoder: Encoder, *, epoch: int) -> dict[str, float]:
        pairs = gather_features(encoder, self.source, self.loading)
        image_to_text, text_to_image = retrieval_ranks(pairs, self.loading, chunk_size=self.chunk_size)
        metrics = openclip_metrics(image_to_text=image_to_text, text_to_image=text_to_image)
        loss = validation_loss(
            pairs.images, pairs.texts, logit_scale=encoder.logit_scale(), batch_size=self.loss_batch_size
        )
        return metrics | {"clip_val_loss": loss, "epoch": epoch, "num_samples": len(pairs.images)}


@dataclass(frozen=True)
class RetrievalEvaluator:
    """Recall on a retrieval set with several captions per image, under CLIP_benchmark's names."""

    frequency: int
    name: str
    source: SampleSource
    loading: Loading
    chunk_size: int

    def run(self, encoder: Encoder, *, epoch: int) -> dict[str, float]:
        pairs = gather_features(encoder, self.source, self.loading)
        image_to_text, text_to_image = retrieval_ranks(pairs, self.loading, chunk_size=self.chunk_size)
        metrics = benchmark_metrics(image_to_text=image_to_text, text_to_image=text_to_image)
        return {f"{self.name}-{key}": value for key, value in metrics.items()}


class PairFeatures(NamedTuple):
    """Features of a whole set, in its order, on every rank."""

    images: Tensor
    """fp32 [N, E]"""
    texts: Tensor
    """fp32 [C, E]; the captions of an image stand together, in the order of the images."""
    text_images: Tensor
    """int64 [C]: for each caption the row of its image."""


def gather_features(encoder: Encoder, source: SampleSource, loading: Loading) -> PairFeatures:
    """Encodes this rank's share and gathers everybody's. Collective: all ranks.

    Raises:
        RuntimeError: the ranks together did not see every sample exactly once.
    """
    positions, images, owners, texts = _encode_share(encoder, source, loading)
    positions, order = all_gather_rows(positions).sort()  # collective: all ranks
    images = all_gather_rows(images)[order]  # collective: all ranks
    if bool((positions[1:] == positions[:-1]).any()):  # host sync
        raise RuntimeError(f"{source.flag}: a sample was evaluated twice: its source deals samples to several parts.")
    _require_complete(len(positions), source)
    # An image's captions come from one rank, in order: a stable sort keeps them so.
    owners, order = all_gather_rows(owners).sort(stable=True)  # collective: all ranks
    texts = all_gather_rows(texts)[order]  # collective: all ranks
    return PairFeatures(images, texts, torch.searchsorted(positions, owners))


def _encode_share(encoder: Encoder, source: SampleSource, loading: Loading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions [n], image features [n, E], owners [c], text features [c, E]) of this rank."""
    shares: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with encoder.in_step():
        for batch in evaluation_batches(source, loading):
            texts = torch.cat([encoder.texts(tokens) for tokens in batch.texts.split(loading.batch_size)])
            shares.append((batch.positions, encoder.images(batch.images), batch.text_owners, texts))
    width = shares[0][1].shape[1] if shares else 0
    # A rank without samples must still gather rows of the right width.
    width = int(all_reduce_max(torch.tensor(width, device=encoder.device)))  # collective: all ranks, host sync
    none = torch.zeros(0, dtype=torch.int64)
    shares.append((none, torch.zeros(0, width), none, torch.zeros(0, width)))
    positions, images, owners, texts = (
        torch.cat([part.to(encoder.device) for part in parts]) for parts in zip(*shares, strict=True)
    )
    return positions, images, owners, texts


def _require_complete(seen: int, source: SampleSource) -> None:
    expected = source.num_samples
    if (expected is not None and seen != expected) or seen == 0:
        raise RuntimeError(f"{source.flag}: {seen} of {expected} samples were seen: did it change since start-up?")


def retrieval_ranks(pairs: PairFeatures, loading: Loading, *, chunk_size: int) -> tuple[Tensor, Tensor]:
    """(ranks of images' best captions [N], ranks of captions' images [C]), on all ranks. Collective: all ranks."""
    rows = torch.arange(len(pairs.images), device=pairs.images.device)
    image_to_text = _shared_ranks(pairs.images, pairs.texts, rows, pairs.text_images, loading, chunk_size=chunk_size)
    text_to_image = _shared_ranks(pairs.texts, pairs.images, pairs.text_images, rows, loading, chunk_size=chunk_size)
    return image_to_text, text_to_image


def _shared_ranks(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, loading: Loading, *, chunk_size: int
) -> Tensor:
    """Chunk i of the queries is ranked by rank i % W. The chunks do not depend on W, so neither do the scores."""
    rows, ranks = [torch.zeros_like(query_ids[:0])], [torch.zeros_like(query_ids[:0])]
    for chunk in _every(torch.arange(len(queries), device=queries.device).split(chunk_size), loading):
        rows.append(chunk)
        ranks.append(
            positive_ranks(
                queries[chunk],
                candidates,
                query_ids=query_ids[chunk],
                candidate_ids=candidate_ids,
                chunk_size=chunk_size,
            )
        )
    order = all_gather_rows(torch.cat(rows)).argsort()  # collective: all ranks
    return all_gather_rows(torch.cat(ranks))[order]  # collective: all ranks


def _every(chunks: Sequence[Tensor], loading: Loading) -> Iterator[Tensor]:
    return iter(chunks[loading.rank :: loading.world_size])


@exact_products()
def validation_loss(images: Tensor, texts: Tensor, *, logit_scale: Tensor, batch_size: int) -> float:
    """Mean over samples of the CLIP loss within batches of ``batch_size`` consecutive pairs (the last may be smaller).

    It grows with the batch size: compare only runs with the same one. As in OpenCLIP it is the softmax loss for SigLIP
    models too, without their bias. Batches are cut from the gathered features, so the world size does not matter.

    Args:
        images: fp32 [N, E]; texts: fp32 [N, E], the pair of each image.
        logit_scale: 0-D, the factor itself.
    """
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for image_batch, text_batch in zip(images.split(batch_size), texts.split(batch_size), strict=True):
        logits = logit_scale * image_batch @ text_batch.T  # [b, E] x [E, b] -> [b, b]
        labels = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        total += loss * len(logits)
    return (total / len(images)).item()  # host sync
