"""What a block keeps for the backward pass, and what it computes twice: less of the one, no product, same bits."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.packing import pack_texts
from tests.models.test_packing import captions
from tests.models.tiny import TIMM_RESNET, tiny_images, tiny_model
from training.distributed.activation_checkpointing import DEAR_TO_COMPUTE, checkpoint_blocks

CONVNEXT = {"timm_model_name": "test_convnext", "image_size": 32}
MODELS = {"patch dropout": {"patch_dropout": 0.3}, "convnext": CONVNEXT, "batch norm": TIMM_RESNET}
LENGTHS = [3, 12, 1, 7]
DEAR = ("mm", "convolution", "attention", "grouped")
"""Parts of the names of products, convolutions and attention, torch's and ours."""


class Operations(TorchDispatchMode):
    """Counts the dear ones, and knows which results still have their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.dear = 0
        self._results: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_depthwise = func is torch.ops.aten.convolution.default and args[8] > 1
        self.dear += any(word in func._schema.name for word in DEAR) and not is_depthwise
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            self._results[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def kept_bytes(self) -> int:
        return sum(size for reference, size in self._results.values() if not reference.expired())


class Step(NamedTuple):
    kept_bytes: int
    dear_backward: int
    state: dict[str, Tensor]
    """Gradients, and buffers: BatchNorm's statistics."""


def forward_backward(policy: str | None, vision: dict[str, Any], *, precision: torch.dtype | None = None) -> Step:
    model = tiny_model(vision).train()
    if policy is not None:
        checkpoint_blocks([*model.image_blocks, *model.text_blocks], policy=policy)
    size = (vision.get("image_size", 32),) * 2
    torch.manual_seed(0)
    with Operations() as operations:
        with nullcontext() if precision is None else torch.autocast("cpu", precision):
            output = model(tiny_images(4, size=size), pack_texts(captions(LENGTHS), multiple=4))
        kept, forward = operations.kept_bytes, operations.dear
        (output.image_features @ output.text_features.T * output.logit_scale).square().mean().backward()
    return Step(kept, operations.dear - forward, state_of(model))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: value for name, value in [*found.items(), *model.named_buffers()] if value is not None}


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_policies_keep_less_and_less_with_the_same_bits(model: str, precision: torch.dtype | None) -> None:
    none, selective, full = (
        forward_backward(policy, MODELS[model], precision=precision) for policy in (None, "selective", "full")
    )
    assert none.kept_bytes > selective.kept_bytes > full.kept_bytes
    # The selective one computes no product, attention or convolution over channels again; the full one does.
    assert none.dear_backward == selective.dear_backward < full.dear_backward
    for found in (selective, full):
        torch.testing.assert_close(found.state, none.state, rtol=0, atol=0)


def test_every_name_of_a_dear_operation_is_one_that_this_torch_has() -> None:
    """A renamed one would be computed again without a word."""
    tiny_model()  # its modules have registered ours
    expected = {"torch_attn::_varlen_attn"}
    if find_spec("torch.nn.attention.varlen") is not None:
        import_module("torch.nn.attention.varlen")
        expected = set()
    assert {name for name in DEAR_TO_COMPUTE if not torch._C._jit_get_schemas_for_operator(name)} == expected


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_compiled_checkpointed_blocks_count_statistics_once(policy: str) -> None:
    states = []
    for chosen in (None, policy):
        torch._dynamo.reset()
        model = tiny_model(TIMM_RESNET).train()
        if chosen is not None:
            checkpoint_blocks(model.image_blocks[:1], policy=chosen)
        model.image_blocks[0].compile(backend="aot_eager")
        model.visual(tiny_images(2, size=(176, 176))).sum().backward()
        states.append(state_of(model))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
