"""Compiles a model's towers with torch.compile: block by block, or each as one graph.

    block        every block by itself: all blocks of a tower share a program, and nothing breaks at the edges of DDP
    model        each tower as one graph: also what lies between blocks and around them; compiles for longer
    task, step   as ``model``: the loss talks to other ranks while the towers compute, and the optimizer obeys a
                 verdict that all ranks share. Neither is in a graph.

CUDA graphs (--torchcompile-mode reduce-overhead and max-autotune) replay the image tower's kernels in the memory in
which they were recorded, so that tower begins a new step whenever it is called. Texts have other shapes in every batch
and are compiled without. One process only: with several, texts, gradients and BatchNorm's statistics are on their way
between ranks while the tower computes, and nobody has shown that a recording survives that.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils._triton import has_triton

from models.packed_attention import mark_dynamic
from models.packing import PackedTexts
from training.config import EngineConfig
from training.distributed.collectives import gather_objects
from training.distributed.mesh import is_sharded

logger = logging.getLogger(__name__)

_INDUCTOR = "inductor"


class CompilePlan(NamedTuple):
    """What --torchcompile comes to."""

    strategy: str
    """``block`` or ``model``."""
    image_options: dict[str, Any]
    """Of ``torch.compile``, for the image tower."""
    text_options: dict[str, Any]
    has_cuda_graphs: bool
    remarks: tuple[str, ...]
    """What of the flags is not followed, and why: for the log."""


def compile_towers(model: nn.Module, config: EngineConfig, *, device: torch.device, world_size: int) -> None:
    """Changes the model in place; without a compiler it stays as it is. Collective: all ranks.

    Raises:
        ValueError: a backend or a mode that torch does not know.
    """
    _check_names(config)
    problem = _agreed(compiler_problem(device.type) if _uses_inductor(config) else None)  # collective: all ranks
    if problem is not None:
        logger.warning("--torchcompile has no effect: %s. The model trains uncompiled.", problem)
        return
    plan = plan_compilation(config, device_type=device.type, world_size=world_size)
    for remark in plan.remarks:
        logger.info("%s", remark)
    # Blocks share one cache, and so do towers: the last block of each, with gradient and without, other batch sizes in
    # an evaluation, and each of ConvNeXt's 36 that drops its path with a probability of its own. Beyond the limit torch
    # runs them uncompiled.
    torch._dynamo.config.recompile_limit = max(128, torch._dynamo.config.recompile_limit)
    # DDP sends gradients while the backward pass runs. A block's are ready when its own graph is done; a whole tower
    # must be cut for that, which torch does at the edges of DDP's buckets, but not through checkpointed blocks.
    torch._dynamo.config.optimize_ddp = plan.strategy == "model" and not config.grad_checkpointing
    compiled = _compile_blocks(model, plan) if plan.strategy == "block" else _compile_encoders(model, plan)
    if not compiled:
        logger.warning("--torchcompile has no effect: no tower of this model is made of repeated blocks")
        return
    if plan.has_cuda_graphs:
        _begin_step_with_images(model)
    backend, mode = config.torchcompile_backend or _INDUCTOR, config.torchcompile_mode or "default"
    units = "blocks" if plan.strategy == "block" else "towers"
    logger.info("torch.compile: %d %s, backend %s, mode %s", compiled, units, backend, mode)


def plan_compilation(config: EngineConfig, *, device_type: str, world_size: int) -> CompilePlan:
    """What is compiled, and how. Pure."""
    remarks = []
    strategy = config.torchcompile_strategy
    if strategy in ("task", "step"):
        strategy = "model"
        remarks.append(
            f"--torchcompile-strategy {config.torchcompile_strategy} compiles as model does: the loss exchanges "
            "features with other ranks, and the optimizer obeys a verdict of all of them; neither is in a graph."
        )
    if strategy == "model" and is_sharded(config, world_size=world_size):
        strategy = "block"
        remarks.append(f"--torchcompile-strategy {config.torchcompile_strategy} compiles blocks: FSDP gathers each.")
    options: dict[str, Any] = {"backend": config.torchcompile_backend or _INDUCTOR}
    mode = config.torchcompile_mode
    if not _uses_inductor(config) or not _mode_options(mode).get("triton.cudagraphs"):
        options |= {} if mode is None else {"mode": mode}
        return CompilePlan(strategy, options, options, False, tuple(remarks))
    others = {name: value for name, value in _mode_options(mode).items() if name != "triton.cudagraphs"}
    without_graphs = options | ({"options": others} if others else {})
    reason = _no_cuda_graphs(config, device_type=device_type, world_size=world_size)
    if reason is not None:
        remarks.append(f"--torchcompile-mode {mode} without CUDA graphs: {reason}.")
        return CompilePlan(strategy, without_graphs, without_graphs, False, tuple(remarks))
    remarks.append(f"--torchcompile-mode {mode}: CUDA graphs for the image tower; texts have no fixed shapes.")
    return CompilePlan(strategy, options | {"mode": mode}, without_graphs, True, tuple(remarks))


def compiler_problem(device_type: str) -> str | None:
    """What Inductor lacks on this machine; None if nothing."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"{header} is missing (install Python's development files)"
    if device_type != "cuda":
        try:
            get_cpp_compiler()
        except RuntimeError:
            return "there is no C++ compiler (install g++, or name one in CXX)"
        return None
    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (install gcc, or name one in CC)"
    return None


def _agreed(problem: str | None) -> str | None:
    """The first rank's that has one: compiled on some ranks only, the slowest would set the pace of all."""
    problems = gather_objects(problem)  # collective: all ranks, host sync
    return next((f"{text} (rank {rank})" for rank, text in enumerate(problems) if text is not None), None)


def _no_cuda_graphs(config: EngineConfig, *, device_type: str, world_size: int) -> str | None:
    if device_type != "cuda":
        return f"--device {device_type} has none"
    if is_sharded(config, world_size=world_size):
        return "with --fsdp weights are gathered into new memory for every use"
    if world_size > 1:
        return "the exchange between ranks goes on while the tower would be recorded"
    if config.accum_freq > 1:
        return "with --accum-freq gradients of one micro-batch wait where the next would be recorded"
    return None


def _uses_inductor(config: EngineConfig) -> bool:
    return (config.torchcompile_backend or _INDUCTOR) == _INDUCTOR


def _mode_options(mode: str | None) -> dict[str, Any]:
    return torch._inductor.list_mode_options(mode) if mode is not None else {}


def _check_names(config: EngineConfig) -> None:
    backends = torch._dynamo.list_backends(exclude_tags=())
    if config.torchcompile_backend is not None and config.torchcompile_backend not in backends:
        raise ValueError(f"--torchcompile-backend {config.torchcompile_backend} is none of {', '.join(backends)}")
    modes = torch._inductor.list_mode_options()
    if _uses_inductor(config) and config.torchcompile_mode not in (None, *modes):
        raise ValueError(f"--torchcompile-mode {config.torchcompile_mode} is none of {', '.join(modes)}")


def _compile_blocks(model: nn.Module, plan: CompilePlan) -> int:
    towers = {"image_blocks": plan.image_options, "text_blocks": plan.text_options}
    blocks = [(block, options) for name, options in towers.items() for block in getattr(model, name, ())]
    for block, options in blocks:
        block.compile(**options)
    return len(blocks)


def _compile_encoders(model: nn.Module, plan: CompilePlan) -> int:
    """The method that encodes, of each tower; its owner's hooks stay outside of the graph."""
    visual = getattr(model, "visual", None)
    if visual is not None:
        visual.forward = functools.partial(torch.compile(type(visual).forward, **plan.image_options), visual)
    # In the classic layout the text tower's parts are the model's own.
    text = getattr(model, "text", model)
    method = "_text_features" if text is model else "forward"
    if hasattr(model, "text") or hasattr(model, method):
        compiled = torch.compile(getattr(type(text), method), **plan.text_options)
        setattr(text, method, functools.partial(_encode_texts, compiled, text))
        return 1 + (visual is not None)
    return int(visual is not None)


def _encode_texts(compiled: Callable[..., Any], owner: nn.Module, texts: Tensor | PackedTexts) -> Any:
    if isinstance(texts, PackedTexts):
        mark_dynamic(texts.tokens, texts.packing)
        torch._dynamo.maybe_mark_dynamic(texts.positions, 0)
    return compiled(owner, texts)


def _begin_step_with_images(model: nn.Module) -> None:
    """Nothing of an earlier call of the tower is needed when it is called: gradients are gone, features are copies."""
    visual = cast(nn.Module, model.visual)
    visual.register_forward_pre_hook(_begin_step)
    visual.register_forward_hook(_copy_features)


def _begin_step(module: nn.Module, inputs: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()


def _copy_features(module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    return features.clone()
