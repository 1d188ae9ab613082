"""Ranks in image-text retrieval, exact and in bounded memory, and the metrics made from them.

Q queries, C candidates, E embedding. A query's rank counts the candidates before its best positive: 0 is a hit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from training.evaluation.exact import exact_products

OPENCLIP_KS = (1, 5, 10)
BENCHMARK_KS = (1, 5, 10)
_MAX_CHUNK_SCORES = 1 << 26
"""Scores held at once, 256 MiB in fp32 and about three times that with masks, however many candidates there are."""


@exact_products()
def positive_ranks(
    queries: Tensor, candidates: Tensor, *, query_ids: Tensor, candidate_ids: Tensor, chunk_size: int = 4096
) -> Tensor:
    """Rank of each query's best positive; a candidate is a positive when it carries the query's id.

    Equal scores are ordered by index, the lower first. A query whose score is NaN gets the rank C, worse than the last.

    Args:
        queries: fp32 [Q, E], normalised.
        candidates: fp32 [C, E], normalised.
        query_ids: int64 [Q]; every id occurs among ``candidate_ids``.
        candidate_ids: int64 [C].
        chunk_size: queries scored at once, at most (fewer where C is large).

    Returns:
        int64 [Q], on the device of the queries.
    """
    rows = max(1, min(chunk_size, _MAX_CHUNK_SCORES // max(1, len(candidates))))
    ranks = [
        _chunk_ranks(queries[start : start + rows] @ candidates.T, query_ids[start : start + rows], candidate_ids)
        for start in range(0, len(queries), rows)
    ]
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=queries.device)


def _chunk_ranks(scores: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    positive = query_ids[:, None] == candidate_ids  # [q, C]
    # max returns the first of equal positives, as the tie rule wants.
    best, place = scores.masked_fill(~positive, -math.inf).max(dim=1, keepdim=True)  # [q, 1]
    index = torch.arange(len(candidate_ids), device=scores.device)
    # Counting what is certainly behind, not what is ahead, puts NaN last: every comparison with it is false.
    behind = (scores < best) | ((scores == best) & (index >= place))  # the positive itself included
    return len(candidate_ids) - behind.sum(dim=1)


def hits_at_k(ranks: Tensor, k: int) -> float:
    """Share of queries with at least one positive among the first k (0..1): recall@k as CLIP papers define it."""
    return (ranks < k).double().mean().item()  # host sync


def mean_reciprocal_rank(ranks: Tensor, k: int) -> float:
    """Mean of 1 / (rank + 1) over all queries, 0 for a query without a positive among the first k (MRR@k)."""
    reciprocal = 1.0 / (ranks.double() + 1.0)
    return reciprocal.masked_fill(ranks >= k, 0.0).mean().item()  # host sync


def openclip_metrics(*, image_to_text: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """The retrieval metrics that OpenCLIP reports for validation pairs; mean and median rank count from 1.

    They depend on the number of candidates: not comparable between validation sets of different size.
    """
    metrics: dict[str, float] = {}
    for direction, ranks in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
        metrics[f"{direction}_mean_rank"] = ranks.double().mean().item() + 1
        metrics[f"{direction}_median_rank"] = math.floor(np.median(ranks.cpu().numpy())) + 1.0
        for k in OPENCLIP_KS:
            metrics[f"{direction}_R@{k}"] = hits_at_k(ranks, k)
    return metrics


def benchmark_metrics(*, image_to_text: Tensor, text_to_image: Tensor) -> dict[str, float]:
    """Recall under CLIP_benchmark's names: ``image_retrieval`` finds images for texts."""
    by_name = {"image_retrieval": text_to_image, "text_retrieval": image_to_text}
    return {f"{name}_recall@{k}": hits_at_k(ranks, k) for name, ranks in by_name.items() for k in BENCHMARK_KS}
