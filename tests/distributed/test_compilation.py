"""What --torchcompile comes to: which graphs, how many, and what happens where something is missing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.batches import caption_lengths
from models.packing import pack_texts
from tests.distributed.launch import current_runtime, run_ranks
from tests.models.test_packing import captions
from tests.models.tiny import tiny_images, tiny_model
from training.config import EngineConfig
from training.distributed import compilation
from training.distributed import parallelize as parallelize_module
from training.distributed.collectives import rank
from training.distributed.compilation import compiler_problem, plan_compilation
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime

ONE = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
GRAPHS = {"torchcompile": True, "torchcompile_mode": "reduce-overhead"}


def compiled(strategy: str = "block", **more: Any) -> EngineConfig:
    more = {"torchcompile_backend": "aot_eager", **more}
    return EngineConfig(device="cpu", torchcompile=True, torchcompile_strategy=strategy, **more)


@pytest.mark.parametrize(
    ("custom", "packed", "backend"), [(False, True, "aot_eager"), (True, True, "eager"), (True, False, "eager")]
)
def test_towers_compiled_as_a_whole_take_random_batches_without_breaks(
    custom: bool, packed: bool, backend: str
) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model({"layers": 2}, {"layers": 2, "context_length": 77}, custom_text=custom).train()
    parallelize(model, config=compiled("model", torchcompile_backend=backend), runtime=ONE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50 if packed else 3):
        lengths = caption_lengths(24, context_length=77, generator=generator).tolist()
        texts = captions(lengths, context=77)
        model(tiny_images(24), pack_texts(texts) if packed else texts).text_features.sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def step_gradients(config: EngineConfig | None) -> dict[str, Tensor]:
    """Of this rank's half of eight pairs; alone, the mean over the halves."""
    model = tiny_model({"width": 192, "layers": 1}, {"width": 192, "layers": 1}).train()
    trained = model if config is None else parallelize(model, config=config, runtime=current_runtime())
    texts, images = captions([3, 12, 1, 7, 5, 9, 2, 12]), tiny_images(8)
    halves = range(2) if config is None else [rank()]
    for place in halves:
        output = trained(images.chunk(2)[place], pack_texts(texts.chunk(2)[place], multiple=4))
        (output.image_features @ output.text_features.T * output.logit_scale).square().mean().backward()
    return {name: parameter.grad / len(halves) for name, parameter in model.named_parameters()}


def gradients_of_both_strategies() -> list[dict[str, Tensor]]:
    # Small buckets: a tower compiled as a whole is cut where DDP sends one.
    parallelize_module.bucket_cap_mib = lambda model: 1  # type: ignore[assignment]
    selective = {"grad_checkpointing": True, "grad_checkpointing_policy": "selective"}
    return [step_gradients(config) for config in (compiled("model"), compiled(**selective))]


def test_strategies_give_the_gradients_of_the_plain_model_on_two_ranks() -> None:
    expected = step_gradients(None)
    for strategies in run_ranks(2, gradients_of_both_strategies, timeout_s=200):
        for found in strategies:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "ranks", "device", "strategy", "has_graphs", "remark"),
    [
        ({}, 2, "cuda", "block", False, None),
        ({"torchcompile_strategy": "step"}, 2, "cuda", "model", False, "step compiles as model does"),
        ({"torchcompile_strategy": "model", "fsdp": True}, 2, "cuda", "block", False, "FSDP gathers each"),
        (GRAPHS, 1, "cuda", "block", True, "CUDA graphs for the image tower"),
        (GRAPHS, 2, "cuda", "block", False, "the exchange between ranks goes on"),
        ({**GRAPHS, "use_bn_sync": True}, 2, "cuda", "block", False, "the exchange between ranks goes on"),
        (GRAPHS, 1, "cpu", "block", False, "--device cpu has none"),
        ({**GRAPHS, "fsdp": True}, 2, "cuda", "block", False, "with --fsdp"),
        ({**GRAPHS, "accum_freq": 2}, 1, "cuda", "block", False, "with --accum-freq"),
        ({**GRAPHS, "torchcompile_backend": "eager"}, 1, "cuda", "block", False, None),
    ],
)
def test_what_is_not_followed_of_the_flags_is_said(
    settings: dict[str, Any], ranks: int, device: str, strategy: str, has_graphs: bool, remark: str | None
) -> None:
    plan = plan_compilation(EngineConfig(**settings), device_type=device, world_size=ranks)
    assert (plan.strategy, plan.has_cuda_graphs) == (strategy, has_graphs)
    assert [remark in text for text in plan.remarks if remark] == [True] * bool(remark)
    assert len(plan.remarks) == bool(remark)


def test_without_cuda_graphs_the_rest_of_a_mode_stays() -> None:
    config = EngineConfig(torchcompile_mode="max-autotune")
    plan = plan_compilation(config, device_type="cuda", world_size=1)
    assert plan.image_options["mode"] == "max-autotune"
    assert plan.text_options["options"]["max_autotune"]
    assert "triton.cudagraphs" not in plan.text_options["options"]


def test_a_tower_with_cuda_graphs_begins_a_step_at_each_call_and_gives_copies(monkeypatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    model = tiny_model({"layers": 1}, {"layers": 1})
    plain = model.visual(tiny_images())
    kept: list[Tensor] = []
    model.visual.register_forward_hook(lambda module, inputs, output: kept.append(output))
    compilation._begin_step_with_images(model)
    features = model.visual(tiny_images())
    assert begun == [1]
    assert torch.equal(features, plain)
    assert features.data_ptr() != kept[0].data_ptr()


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"torchcompile_backend": "nonsense"}, "--torchcompile-backend nonsense is none of"),
        ({"torchcompile_backend": None, "torchcompile_mode": "x"}, "--torchcompile-mode x is none of default"),
    ],
)
def test_names_that_torch_does_not_know_are_refused(names: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parallelize(tiny_model(), config=compiled(**names), runtime=ONE)


SCRIPT = """
import logging, torch
logging.basicConfig(level="INFO", format="%(message)s")
from tests.distributed.test_compilation import ONE, captions, compiled, parallelize, tiny_images, tiny_model
model = tiny_model({"layers": 1}, {"layers": 1}).train()
parallelize(model, config=compiled(torchcompile_backend=None), runtime=ONE)
model(tiny_images(2), captions([3, 4])).image_features.sum().backward()
"""


def test_without_a_compiler_training_is_not_compiled_and_says_so_before(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--torchcompile has no effect: there is no C++ compiler (install g++, or name one in CXX)" in done.stderr


def test_what_a_gpu_s_compiler_lacks_has_a_name(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "has_triton", lambda: False)
    assert "Triton is not installed" in str(compiler_problem("cuda"))
    monkeypatch.setattr(compilation, "has_triton", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Triton finds no C compiler" in str(compiler_problem("cuda"))
    monkeypatch.setenv("CC", "cc")
    assert compiler_problem("cuda") is None
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h is missing" in str(compiler_problem("cuda"))


def compile_where_one_rank_has_no_compiler() -> str:
    compilation.compiler_problem = lambda device: "no compiler here" if rank() == 1 else None
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    compilation.logger.addHandler(handler)
    model = tiny_model({"layers": 1}, {"layers": 1})
    parallelize(model, config=compiled(torchcompile_backend=None), runtime=current_runtime())
    assert model.image_blocks[0]._compiled_call_impl is None
    return lines[0]


def test_no_rank_compiles_where_one_cannot() -> None:
    expected = "--torchcompile has no effect: no compiler here (rank 1). The model trains uncompiled."
    assert run_ranks(2, compile_where_one_rank_has_no_compiler) == [expected] * 2
