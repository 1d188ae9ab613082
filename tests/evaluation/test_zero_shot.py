"""Classifier weights and accuracies, against OpenCLIP's on the same model."""

from __future__ import annotations

import open_clip
import pytest
import torch

from tests.evaluation.builders import CLASS_NAMES, TEMPLATES, tiny_clip, tokenizer
from training.evaluation.prompts import Prompts
from training.evaluation.zero_shot import accuracy, class_weights, count_hits, label_ranks, tokenize_prompts

PROMPTS = Prompts(CLASS_NAMES, TEMPLATES)


@torch.no_grad()
@pytest.mark.parametrize("prompts_per_forward", [1, 2, 6, 7, 1000])
def test_classifier_weights_equal_openclips(prompts_per_forward: int) -> None:
    model = tiny_clip()
    tokens = tokenize_prompts(PROMPTS, tokenizer(), classes=range(len(CLASS_NAMES)))
    sizes = []

    def encode(texts: torch.Tensor) -> torch.Tensor:
        sizes.append(len(texts))
        return model.encode_text(texts, normalize=True)

    ours = class_weights(tokens, encode, prompts_per_forward=prompts_per_forward)
    templates = [template.replace("{c}", "{}") for template in TEMPLATES]
    reference = open_clip.build_zero_shot_classifier(model, tokenizer(), CLASS_NAMES, templates)
    torch.testing.assert_close(ours, reference.T, atol=1e-6, rtol=0)
    assert max(sizes) <= prompts_per_forward


@pytest.mark.parametrize("num_classes", [3, 5, 9])
def test_accuracies_equal_openclips(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(num_classes)
    features, weights = torch.randn(200, 8, generator=generator), torch.randn(num_classes, 8, generator=generator)
    labels = torch.randint(0, num_classes, (200,), generator=generator)
    ranks = label_ranks(features, weights, labels)
    ours = accuracy(count_hits(ranks, labels, num_classes=num_classes))
    ks = (1, 5) if num_classes >= 5 else (1,)
    # As open_clip_train.zero_shot.accuracy does, which numpy 2.4 no longer runs (float() of an array with one element).
    best = (features @ weights.T).topk(max(ks), dim=1).indices
    reference = [(best[:, :k] == labels[:, None]).any(dim=1).double().mean().item() for k in ks]
    assert [ours[f"top{k}"] for k in ks] == pytest.approx(reference, abs=1e-12)
    assert ("top5" in ours) == (num_classes >= 5)
    recalls = [((ranks < 1) & (labels == c)).sum() / (labels == c).sum() for c in range(num_classes)]
    assert ours["mean_per_class_recall"] == pytest.approx(float(torch.stack(recalls).mean()), abs=1e-6)


def test_mean_per_class_recall_leaves_out_classes_that_do_not_occur() -> None:
    counts = torch.tensor([[4, 1, 0], [1, 1, 0], [4, 1, 0]])
    assert accuracy(counts)["mean_per_class_recall"] == pytest.approx((1 / 4 + 1) / 2)
    assert accuracy(counts)["top1"] == pytest.approx(2 / 5)


def test_equal_scores_rank_the_lower_class_first() -> None:
    weights = torch.ones(4, 2)
    assert label_ranks(torch.ones(4, 2), weights, torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_nan_features_are_never_right() -> None:
    ranks = label_ranks(torch.full((2, 2), float("nan")), torch.ones(3, 2), torch.tensor([0, 2]))
    assert ranks.tolist() == [3, 3]
