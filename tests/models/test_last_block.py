"""The last block computes only what is read, and that exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.clip import Clip
from models.packing import pack_texts
from models.transformer import BlockOptions, ResidualAttentionBlock, Transformer
from tests.models.test_packing import captions
from tests.models.tiny import tiny_images, tiny_model

PRODUCTS = ("aten.addmm.default", "aten.mm.default", "aten.bmm.default")


def compute_whole(model: Clip) -> None:
    for module in model.modules():
        if isinstance(module, Transformer):
            module.whole_last_block = True


class OperatorLog(TorchDispatchMode):
    """Counts matrix products, and remembers how many rows each had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in PRODUCTS:
            self.calls[str(func)] += 1
            self.rows.append(args[str(func) == "aten.addmm.default"].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({}, {}),
        ({"ls_init_value": 0.3, "patch_dropout": 0.5}, {"pool_type": "first"}),
        ({"pool_type": "avg"}, {"pool_type": "last"}),
        ({"final_ln_after_pool": True}, {"no_causal_mask": True, "pool_type": "eos", "eos_id": 49}),
    ],
)
def test_features_and_gradients_are_those_of_a_whole_last_block(vision: Any, text: Any) -> None:
    results = []
    for whole in (False, True):
        model = tiny_model(vision, text).double().train()
        if whole:
            compute_whole(model)
        torch.manual_seed(6)
        output = model(tiny_images(5).double(), captions([3, 7, 1, 12, 4]))
        weights = torch.randn(5, 24, dtype=torch.float64)
        ((output.image_features - output.text_features) * weights).sum().backward()
        results.append([output.image_features, output.text_features, *(p.grad for p in model.parameters())])
    for pruned, whole_block in zip(*results, strict=True):
        torch.testing.assert_close(pruned, whole_block, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_is_four_matrix_products(packed: bool) -> None:
    block = ResidualAttentionBlock(BlockOptions(width=48, heads=3, causal=True))
    packing = pack_texts(captions([3, 7, 12])).packing if packed else None
    tokens = torch.randn(22, 48) if packed else torch.randn(3, 12, 48)
    with OperatorLog() as log, torch.no_grad():
        block(tokens, packing)
    assert log.calls.total() == 4


def test_the_last_block_projects_only_the_tokens_read() -> None:
    block = ResidualAttentionBlock(BlockOptions(width=48, heads=3))
    with OperatorLog() as log, torch.no_grad():
        found = block(torch.randn(3, 12, 48), None, 0)
    assert found.shape == (3, 48)
    assert log.rows == [3, 36, 3, 3, 3]  # query; keys and values; output projection; MLP in, out


@pytest.mark.parametrize("pool_type", ["avg", "tok"])
def test_average_pooling_reads_all_tokens(pool_type: str) -> None:
    model, shapes = tiny_model({"pool_type": pool_type}), []
    model.image_blocks[-1].register_forward_hook(lambda module, inputs, output: shapes.append(output.ndim))
    model.encode_image(tiny_images(2))
    assert shapes == [3 if pool_type == "avg" else 2]


def test_without_being_read_a_stack_gives_all_tokens() -> None:
    stack, tokens = tiny_model().transformer, torch.randn(2, 5, 48)
    everything: Tensor = stack(tokens)
    assert everything.shape == (2, 5, 48)
    torch.testing.assert_close(stack(tokens, read=4), everything[:, 4], atol=1e-5, rtol=0)
