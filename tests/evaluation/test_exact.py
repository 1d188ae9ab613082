"""Scores are computed in full fp32 although training allows TF32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training.evaluation.evaluators import validation_loss
from training.evaluation.exact import exact_products
from training.evaluation.retrieval import positive_ranks
from training.evaluation.zero_shot import label_ranks


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


class ProductPrecisions(TorchDispatchMode):
    """Notes the precision setting at every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("tf32_allowed")
def test_ranks_and_loss_use_full_fp32_products_and_leave_the_setting_as_it_was() -> None:
    features, ids = F.normalize(torch.randn(4, 8), dim=-1), torch.arange(4)
    with ProductPrecisions() as products:
        positive_ranks(features, features, query_ids=ids, candidate_ids=ids)
        label_ranks(features, features, ids)
        validation_loss(features, features, logit_scale=torch.tensor(10.0), batch_size=4)
        features @ features.T
    assert products.seen == ["highest", "highest", "highest", "high"]


@pytest.mark.usefixtures("tf32_allowed")
def test_the_setting_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), exact_products():
        raise KeyError("any")
    assert torch.get_float32_matmul_precision() == "high"
