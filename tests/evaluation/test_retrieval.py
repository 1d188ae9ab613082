"""Ranks and retrieval metrics, against OpenCLIP's, CLIP_benchmark's definition, and sorting in Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip_train.train import get_clip_metrics
from torch import Tensor
from torch.nn import functional as F

from training.evaluation.retrieval import (
    benchmark_metrics,
    hits_at_k,
    mean_reciprocal_rank,
    openclip_metrics,
    positive_ranks,
)


def features(count: int, *, seed: int, width: int = 16) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pair_ranks(queries: Tensor, candidates: Tensor, *, chunk_size: int) -> Tensor:
    ids = torch.arange(len(queries))
    return positive_ranks(queries, candidates, query_ids=ids, candidate_ids=ids, chunk_size=chunk_size)


@pytest.mark.parametrize("count", [1, 2, 36, 37])
def test_pair_metrics_equal_openclips(count: int) -> None:
    images = features(count, seed=1)
    texts = F.normalize(images + 0.9 * features(count, seed=2), dim=-1)
    ours = openclip_metrics(
        image_to_text=pair_ranks(images, texts, chunk_size=5), text_to_image=pair_ranks(texts, images, chunk_size=5)
    )
    reference = get_clip_metrics(images, texts, torch.tensor(14.3))
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-12), name


def test_chunk_size_does_not_change_ranks() -> None:
    queries, candidates = features(50, seed=3), features(50, seed=4)
    whole = pair_ranks(queries, candidates, chunk_size=4096)
    assert whole.max() > 10
    for chunk_size in (1, 7, 50):
        assert torch.equal(pair_ranks(queries, candidates, chunk_size=chunk_size), whole)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_equal_a_stable_sort_of_the_scores(data: st.DataObject) -> None:
    """Small integer features give many equal scores; positives are any set of candidates."""
    integers = st.integers(-2, 2)
    num_candidates = data.draw(st.integers(1, 12))
    candidate_ids = data.draw(st.lists(st.integers(0, 3), min_size=num_candidates, max_size=num_candidates))
    query_ids = data.draw(st.lists(st.sampled_from(candidate_ids), min_size=1, max_size=6))
    candidates = torch.tensor([data.draw(st.tuples(integers, integers)) for _ in candidate_ids]).float()
    queries = torch.tensor([data.draw(st.tuples(integers, integers)) for _ in query_ids]).float()
    ranks = positive_ranks(
        queries, candidates, query_ids=torch.tensor(query_ids), candidate_ids=torch.tensor(candidate_ids), chunk_size=2
    )
    for query, wanted, rank in zip(queries, query_ids, ranks.tolist(), strict=True):
        scores = (candidates @ query).tolist()
        order = sorted(range(num_candidates), key=lambda index: (-scores[index], index))
        assert rank == next(place for place, index in enumerate(order) if candidate_ids[index] == wanted)


def test_equal_scores_are_ordered_by_index() -> None:
    same = torch.ones(4, 3) / 3**0.5
    assert pair_ranks(same, same, chunk_size=2).tolist() == [0, 1, 2, 3]


def test_a_nan_score_ranks_behind_every_candidate() -> None:
    broken = torch.full((3, 2), float("nan"))
    assert pair_ranks(broken, features(3, seed=5, width=2), chunk_size=2).tolist() == [3, 3, 3]
    ranks = pair_ranks(broken, broken, chunk_size=2)
    assert hits_at_k(ranks, 1) == 0.0


def test_no_queries_give_no_ranks() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    candidates = features(3, seed=6, width=4)
    ranks = positive_ranks(torch.zeros(0, 4), candidates, query_ids=none, candidate_ids=torch.arange(3))
    assert ranks.shape == (0,)


def test_recall_with_several_captions_is_the_share_of_queries_with_a_positive_in_the_top_k() -> None:
    owners = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11])
    images, texts = features(12, seed=7), features(len(owners), seed=8)
    texts = F.normalize(texts + 0.5 * images[owners], dim=-1)
    rows = torch.arange(len(images))
    ours = benchmark_metrics(
        image_to_text=positive_ranks(images, texts, query_ids=rows, candidate_ids=owners),
        text_to_image=positive_ranks(texts, images, query_ids=owners, candidate_ids=rows),
    )
    scores = texts @ images.T
    for k in (1, 5, 10):
        found_images = [owners[text] in scores[text].topk(k).indices for text in range(len(owners))]
        found_texts = [bool((owners[scores[:, image].topk(k).indices] == image).any()) for image in range(len(images))]
        assert ours[f"image_retrieval_recall@{k}"] == pytest.approx(sum(found_images) / len(found_images))
        assert ours[f"text_retrieval_recall@{k}"] == pytest.approx(sum(found_texts) / len(found_texts))
    assert ours["image_retrieval_recall@1"] < ours["image_retrieval_recall@5"]


def test_mean_reciprocal_rank_and_hits_by_hand() -> None:
    ranks = torch.tensor([0, 1, 4, 9, 10])
    assert mean_reciprocal_rank(ranks, 10) == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 10 + 0) / 5)
    assert mean_reciprocal_rank(ranks, 1) == pytest.approx(1 / 5)
    assert hits_at_k(ranks, 5) == pytest.approx(3 / 5)
    assert hits_at_k(ranks, 11) == 1.0


def test_median_rank_of_an_even_number_is_rounded_down() -> None:
    metrics = openclip_metrics(image_to_text=torch.tensor([0, 3]), text_to_image=torch.tensor([4, 1, 2]))
    assert metrics["image_to_text_median_rank"] == 2.0
    assert metrics["text_to_image_median_rank"] == 3.0
