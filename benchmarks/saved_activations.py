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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.model_facts import CudaAutocastPolicy, to_fake_cpu
from benchmarks.scale_world import LiveMemory
from benchmarks.training_flops import ending_at
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
_BATCHES = (16, 32)


def saved_by_us(model_name: str, lengths: Sequence[int], *, way: str) -> float:
    """Bytes per pair.

    Args:
        lengths: tokens of captions, which fill the batches in turn.
        way: one of ``WAYS``.
    """
    counts = []
    for batch_size in _BATCHES:
        model, config, _ = create_model(model_name, device="meta")
        texts = pack_texts(ending_at(lengths[:batch_size], config.text_cfg.context_length))
        with _without_memory() as mode:
            to_fake_cpu(model.train())
            images = torch.empty(batch_size, 3, *config.vision_cfg.image_hw)
            packed = tree_map_only(Tensor, mode.from_tensor, texts)
            engine = EngineConfig(device="cpu", **WAYS[way])
            runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
            trained = parallelize(model, config=engine, runtime=runtime)
            count = _count_saved if engine.torchcompile else _count_live
            before = [*model.parameters(), *model.buffers(), images, *_tensors(packed)]
            counts.append(count(partial(trained, images, packed), before))
    return _per_pair(counts)


def saved_by_open_clip(model_name: str) -> float:
    """Bytes per pair, captions of full length."""
    import open_clip

    counts = []
    for batch_size in _BATCHES:
        with torch.device("meta"):
            model = open_clip.create_model(model_name, device="meta")
        size = model.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        with _without_memory():
            to_fake_cpu(model.train())
            images = torch.empty(batch_size, 3, height, width)
            texts = torch.zeros(batch_size, model.context_length, dtype=torch.int64)
            counts.append(
                _count_live(partial(model, images, texts), [*model.parameters(), *model.buffers(), images, texts])
            )
    return _per_pair(counts)


def _per_pair(counts: Sequence[int]) -> float:
    return (counts[1] - counts[0]) / (_BATCHES[1] - _BATCHES[0])


@contextmanager
def _without_memory() -> Iterator[FakeTensorMode]:
    torch._dynamo.reset()
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
