"""Zero-shot classification: classifier weights from prompts, ranks of the true class, accuracy from counts.

M classes, T templates, L text tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from training.evaluation.exact import exact_products
from training.evaluation.prompts import Prompts

TextEncoder = Callable[[Tensor], Tensor]
"""int64 [n, L] -> normalised fp32 [n, E]."""
Tokenizer = Callable[[list[str]], Tensor]


def tokenize_prompts(prompts: Prompts, tokenizer: Tokenizer, *, classes: range) -> Tensor:
    """The tokens of every prompt of ``classes``, int32 [len(classes), T, L] (half the memory of int64)."""
    texts = [text for index in classes for text in prompts.of_class(index)]
    tokens = tokenizer(texts).to(torch.int32)
    return tokens.view(len(classes), len(prompts.templates), -1)


def class_weights(tokens: Tensor, encode: TextEncoder, *, prompts_per_forward: int) -> Tensor:
    """Classifier weights [M, E] in fp32: per class the normalised mean of its prompts' normalised features.

    At most ``prompts_per_forward`` prompts are encoded at once, so memory does not grow with M or T.

    Args:
        tokens: [M, T, L].
    """
    num_classes, num_templates, length = tokens.shape
    classes_per_chunk = max(1, prompts_per_forward // num_templates)
    templates_per_chunk = min(num_templates, prompts_per_forward)
    weights = []
    for chunk in tokens.split(classes_per_chunk):  # [c, T, L]
        total: Tensor | float = 0.0
        for part in chunk.split(templates_per_chunk, dim=1):  # [c, t, L]
            features = encode(part.reshape(-1, length).long())  # [c * t, E]
            total = total + features.view(len(chunk), part.shape[1], -1).sum(dim=1)  # [c, E]
        assert isinstance(total, Tensor)
        weights.append(F.normalize(total / num_templates, dim=-1))
    return torch.cat(weights)


@exact_products()
def label_ranks(image_features: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """How many classes score higher than the true one, int64 [B]; equal scores: the lower class first.

    NaN features rank the true class last (M), so a diverged model is never right by accident.

    Args:
        image_features: fp32 [B, E]; weights: fp32 [M, E]; labels: int64 [B].
    """
    scores = image_features @ weights.T  # [B, E] x [E, M] -> [B, M]
    true = scores.gather(1, labels[:, None])  # [B, 1]
    index = torch.arange(len(weights), device=scores.device)
    behind = (scores < true) | ((scores == true) & (index >= labels[:, None]))
    return len(weights) - behind.sum(dim=1)


def count_hits(ranks: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Per class: samples, samples ranked first, samples ranked in the first five; int64 [3, M], summable over ranks."""
    groups = (labels, labels[ranks < 1], labels[ranks < 5])
    return torch.stack([torch.bincount(group, minlength=num_classes) for group in groups])


def accuracy(counts: Tensor) -> dict[str, float]:
    """``top1`` and ``top5`` over samples, ``mean_per_class_recall`` over the classes that occur (all 0..1).

    ``top5`` is left out below five classes, where it would always be 1.

    Args:
        counts: int64 [3, M] of the whole set, as ``count_hits`` returns.
    """
    samples, first, first_five = counts.double().cpu()  # host sync
    present = samples > 0
    result = {"top1": (first.sum() / samples.sum()).item()}
    if len(samples) >= 5:
        result["top5"] = (first_five.sum() / samples.sum()).item()
    result["mean_per_class_recall"] = (first[present] / samples[present]).mean().item()
    return result
