"""The loss alone, on one rank of many: its memory at 1,024 ranks, and what it does when it is executed.

    python -m benchmarks.scale_loss

    counted    at all local batches, 1,024 ranks, beside losses that store their logits
    executed   at local batch 896 with 96 ranks, beside a reference in fp64, and with 1,024 ranks

Counted with tensors that have shapes and no memory (scale_world.LiveMemory): features in, loss and backward, peak of
all that exists beside the features and their gradients. The stored forms are OpenCLIP's two ways to compute the softmax
loss, written out here for comparison; nothing trains with them.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from benchmarks.executed_loss import Shape, execute
from benchmarks.scale_jobs import LOCAL_BATCHES
from benchmarks.scale_rank import LOSSES, WORLD
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, table
from benchmarks.scale_world import LiveMemory, fake_world
from models.config import load_model_config
from training.config import LossConfig
from training.distributed.collectives import rank, world_size
from training.losses import build_loss
from training.losses.tiles import TILE_ELEMENTS

NAME = "scale_loss"
BF16 = LossConfig(gather_dtype="bf16")
EXECUTED = {**LOSSES, "CLIP, texts in bf16": BF16}


def stored_softmax(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, *, all_rows: bool
) -> Tensor:
    """The softmax loss with its logits in memory, both towers' features gathered.

    Args:
        all_rows: every rank computes the whole of both problems, as OpenCLIP does without --local-loss.

    Source: ClipLoss of open_clip 3.3.0, with --gather-with-grad.
    """
    all_images, all_texts = image_features, text_features
    if world_size() > 1:
        all_images, all_texts = _AllGatherRows.apply(image_features), _AllGatherRows.apply(text_features)  # [G, E]
    if all_rows:
        by_image = logit_scale * all_images @ all_texts.T  # [G, E] x [E, G] -> [G, G]
        by_text = by_image.T
        labels = torch.arange(len(all_images))
    else:
        by_image = logit_scale * image_features @ all_texts.T  # [B, E] x [E, G] -> [B, G]
        by_text = logit_scale * text_features @ all_images.T
        labels = torch.arange(len(image_features)) + rank() * len(image_features)
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


class _AllGatherRows(torch.autograd.Function):
    """Rows of all ranks, [B, E] -> [G, E]; the backward pass sums over ranks what each of them asks of these rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        summed = grad.new_empty((len(grad) // world_size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(summed, grad.contiguous())
        return summed


FORMS: Mapping[str, Callable[..., Tensor]] = {
    **{name: build_loss(config) for name, config in EXECUTED.items()},
    "softmax, stored logits of local rows": partial(stored_softmax, all_rows=False),
    "softmax, stored logits of all rows": partial(stored_softmax, all_rows=True),
}
"""What is counted, in the order of the table's columns."""


def measure(*, small: bool = False) -> Result:
    """For the local batches of the historical runs."""
    settings = {"demo-vit": 8} if small else LOCAL_BATCHES
    world = 64 if small else WORLD
    rows = []
    for model, batch_size in settings.items():
        width = load_model_config(model).embed_dim
        row: dict[str, Any] = {
            "model": model,
            "batch_size": batch_size,
            "width": width,
            "global_batch": world * batch_size,
            "counted": {name: count_bytes(name, batch_size, width, world=world) for name in FORMS},
        }
        rows.append(row)
    return {"world": world, "tile_elements": TILE_ELEMENTS, "rows": rows, "executed": run_rank(small=small)}


def run_rank(*, small: bool) -> list[dict[str, Any]]:
    """With 96 ranks all losses, and exact; with 1,024 only the largest, for the reference would take minutes."""
    few, many = (Shape(8, 16, 32), Shape(16, 16, 32)) if small else (Shape(96, 896, 512), Shape(WORLD, 896, 512))
    found = [{"name": name, **execute(config, few, check=True)} for name, config in EXECUTED.items()]
    return [*found, {"name": "CLIP", **execute(LOSSES["CLIP"], many, check=False)}]


def count_bytes(form: str, batch_size: int, width: int, *, world: int) -> int:
    """Peak beside what goes in and its gradient."""
    memory = LiveMemory()
    with fake_world(world, rank=5), FakeTensorMode(), memory:
        images, texts = (torch.empty(batch_size, width, requires_grad=True) for _ in range(2))
        scale, bias = (torch.empty((), requires_grad=True) for _ in range(2))
        start = memory.live
        memory.peak = start
        FORMS[form](images, texts, scale, bias).backward()
        return memory.peak - 2 * start


def tables(result: Result) -> Tables:
    """Markdown by name."""
    body = [
        [
            row["model"],
            row["batch_size"],
            f"{row['global_batch']:,}",
            *map(num_bytes, row["counted"].values()),
        ]
        for row in result["rows"]
    ]
    return {
        "loss_memory": table(["model", "b", "global batch", *result["rows"][0]["counted"]], body),
        "loss_executed": _executed_table(result.get("executed", ())),
    }


def _executed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "ranks",
        "loss",
        "matrix products B x G x E",
        "peak of tensors",
        "peak resident",
        "kept between the passes, largest tensor",
        "gather, all-reduce, reduce-scatter",
        "largest relative error against fp64",
    ]

    def cells(row: Mapping[str, Any]) -> list[object]:
        messages = Counter(row["messages"])
        kept, texts = row["largest_kept_elements"], row["global_batch"] * row["width"]
        return [
            row["world"],
            row["name"],
            f"{row['products']:.3g}",
            num_bytes(row["peak_tensor_bytes"]),
            num_bytes(row["peak_resident_bytes"]),
            "all texts" if kept == texts else f"{kept:,} elements",
            ", ".join(str(messages[name]) for name in ("_allgather_base_", "allreduce_", "_reduce_scatter_base_")),
            f"{max(row['relative_errors'].values()):.1e}" if "relative_errors" in row else "-",
        ]

    return table(header, [cells(row) for row in rows])


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
