"""FSDP2 on a GPU: streams, bf16 gathering and offloading, with a group of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.launch import free_port
from tests.models.tiny import CONTEXT, CONVNEXT, TIMM_VIT, VOCABULARY, tiny_model
from training.config import EngineConfig, LossConfig, OptimConfig
from training.data.batch import DeviceBatch
from training.distributed.mesh import build_mesh
from training.distributed.parallelize import fully_shard_blocks, parallelize
from training.distributed.runtime import Runtime
from training.distributed.sharding import local_parameters, register_sharding
from training.losses import build_loss
from training.optim.optimizer import build_optimizer
from training.precision import build_precision
from training.train_step import TrainStep

CUDA = torch.device("cuda", 0)
ALONE = Runtime(rank=0, local_rank=0, world_size=1, device=CUDA)


@pytest.fixture(scope="module", autouse=True)
def group():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1, device_id=CUDA
    )
    yield
    dist.destroy_process_group()


def trained(vision: dict[str, Any] | None, pixels: int, *, fsdp: bool, opt: str, **engine: Any) -> dict[str, Any]:
    model = tiny_model(vision).train().to(CUDA)
    config = EngineConfig(fsdp=fsdp, grad_checkpointing=True, **engine)
    row = build_precision("amp_bf16", CUDA)
    if fsdp:
        fully_shard_blocks(model, config, mesh=build_mesh(0, runtime=ALONE), param_dtype=row.autocast_dtype)
        register_sharding(model)
    wrapped: nn.Module = model if fsdp else parallelize(model, config=config, runtime=ALONE)
    step = TrainStep(
        model=wrapped,
        loss=build_loss(LossConfig()),
        optimizer=build_optimizer(model, OptimConfig(opt=opt, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-6)),
        precision=row,
        grad_clip_norm=1.0,
    )
    torch.manual_seed(0)
    for _ in range(3):
        images = torch.randn(8, 3, pixels, pixels, device=CUDA)
        texts = torch.randint(1, VOCABULARY, (8, CONTEXT), device=CUDA)
        metrics = step([DeviceBatch(images, texts)], lr=1e-3)
    return {"loss": metrics.loss.cpu(), **{n: p.detach().cpu() for n, p in local_parameters(model).items()}}


@pytest.mark.parametrize("opt", ["adamw", "stableadamw"])
@pytest.mark.parametrize(("vision", "pixels"), [(None, 32), (TIMM_VIT, 160), (CONVNEXT, 64)])
@pytest.mark.parametrize("engine", [{}, {"fsdp_offload_cpu": True}, {"fsdp_no_reshard_after_forward": True}])
def test_training_is_that_of_the_plain_model(vision, pixels, engine, opt):
    expected = trained(vision, pixels, fsdp=False, opt=opt)
    found = trained(vision, pixels, fsdp=True, opt=opt, **engine)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=3e-3, msg=name)
