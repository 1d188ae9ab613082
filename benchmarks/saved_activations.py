"""Bytes that a forward pass keeps for the backward pass, counted from the real code on tensors without memory.

    plain       no flag at all
    compiled    --torchcompile: what Inductor's partitioner chooses to keep
    selective   --grad-checkpointing --grad-checkpointing-policy selective: norms and activations are computed again
    both        the two together

Under bf16 autocast as on CUDA, captions packed. Two batch sizes are compared, so that what does not grow with the batch
(weights cast to bf16) drops out. OpenCLIP is counted by the same hooks on its own modules, eager as it is by default.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.model_facts import CudaAutocastPolicy, to_fake_cpu
from benchmarks.open_clip_models import build_open_clip, open_clip_inputs
from benchmarks.scale_world import LiveMemory
from benchmarks.training_flops import count_flops, ending_at
from models.factory import create_model
from models.packing import pack_texts
from training.config import EngineConfig
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime

_SELECTIVE = {"grad_checkpointing": True, "grad_checkpointing_policy": "selective"}
# Inductor's decompositions and its choice of what to keep, without its code: that needs no compiler.
_COMPILED = {"torchcompile": True, "torchcompile_backend": "aot_eager_decomp_partition"}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "compiled": _COMPILED,
    "selective": _SELECTIVE,
    "both": {**_COMPILED, **_SELECTIVE},
}
BATCHES = (16, 32)
"""The two sizes."""
_ALONE = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def saved_by_us(model_name: str, lengths: Sequence[int], *, way: str) -> float:
    """Bytes per pair.

    Args:
        lengths: tokens of captions, as many as the larger batch at least.
        way: one of ``WAYS``.
    """
    model, config, _ = create_model(model_name, device="meta")
    assert len(lengths) >= BATCHES[-1]
    engine = EngineConfig(device="cpu", **WAYS[way])
    count = _count_saved if engine.torchcompile else _count_live
    counts = []
    with _without_memory() as mode:
        to_fake_cpu(model.train())
        trained = parallelize(model, config=engine, runtime=_ALONE)
        for batch_size in BATCHES:
            images = torch.empty(batch_size, 3, *config.vision_cfg.image_hw)
            with unset_fake_temporarily():
                texts = pack_texts(ending_at(lengths[:batch_size], config.text_cfg.context_length))
            texts = tree_map_only(Tensor, mode.from_tensor, texts)
            before = [*model.parameters(), *model.buffers(), images, *_tensors(texts)]
            torch._dynamo.reset()  # or it would make programs for both sizes at once
            counts.append(count(partial(trained, images, texts), before))
    return _per_pair(counts)


def flops_computed_again(model_name: str, lengths: Sequence[int], *, way: str = "selective") -> float:
    """What the backward pass computes a second time, as a share of the FLOPs of training without it."""
    without, with_it = (_training_flops(model_name, lengths, way=chosen) for chosen in ("plain", way))
    return with_it / without - 1


def _training_flops(model_name: str, lengths: Sequence[int], *, way: str) -> int:
    model, config, _ = create_model(model_name, device="meta")
    trained = parallelize(model.train(), config=EngineConfig(device="cpu", **WAYS[way]), runtime=_ALONE)
    images = torch.empty(len(lengths), 3, *config.vision_cfg.image_hw, device="meta")
    texts = pack_texts(ending_at(lengths, config.text_cfg.context_length)).to("meta")

    def forward() -> Tensor:
        output = trained(images, texts)
        total: Tensor = output.image_features.sum() + output.text_features.sum()
        return total

    return count_flops(forward)


def saved_by_open_clip(model_name: str) -> float:
    """Bytes per pair, captions of full length."""
    model = build_open_clip(model_name)
    counts = []
    with _without_memory():
        to_fake_cpu(model)
        for batch_size in BATCHES:
            images, texts = open_clip_inputs(model, batch_size, device="cpu")
            before = [*model.parameters(), *model.buffers(), images, texts]
            counts.append(_count_live(partial(model, images, texts), before))
    return _per_pair(counts)


def _per_pair(counts: Sequence[int]) -> float:
    return (counts[1] - counts[0]) / (BATCHES[1] - BATCHES[0])


@contextmanager
def _without_memory() -> Iterator[FakeTensorMode]:
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.simplefilter("ignore")  # timm and autocast remark on what is meant so here
        yield mode


def _count_live(forward: Callable[[], Any], before: Sequence[Tensor]) -> int:
    """All that exists after the forward pass and not before: also what checkpointing keeps out of autograd's sight."""
    memory = LiveMemory()
    for tensor in before:
        memory.add(tensor)
    start = memory.live
    with memory, _autocast_as_on_cuda():
        kept = forward()
    found = memory.live - start
    del kept
    return found


def _count_saved(forward: Callable[[], Any], before: Sequence[Tensor]) -> int:
    """What autograd keeps, each storage once. Nothing is compiled where every operation is watched, as above."""
    # Kept alive, because a freed storage's address may be used again.
    known = {_storage(tensor): tensor for tensor in before}
    num_before = len(known)

    def save(tensor: Tensor) -> Tensor:
        known.setdefault(_storage(tensor), tensor)
        return tensor

    with _autocast_as_on_cuda(), torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in list(known.values())[num_before:])


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _autocast_as_on_cuda() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16), CudaAutocastPolicy():
        yield
