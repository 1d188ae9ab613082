"""Memory of the loss alone, on one rank of 1,024: counted from the real code, beside the formula of a tiled one.

    python -m benchmarks.scale_loss

Counted with tensors that have shapes and no memory (scale_world.LiveMemory): features in, loss and backward, peak of
all that exists beside the features and their gradients. A tiled CLIP loss does not exist in this repository yet: its
column is a formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.scale_jobs import LOCAL_BATCHES
from benchmarks.scale_rank import LOSSES, WORLD
from benchmarks.scale_report import Result, Tables, num_bytes, run_benchmark, table
from benchmarks.scale_world import LiveMemory, fake_world
from models.config import load_model_config
from training.losses.build import build_loss
from training.losses.siglip_loss import CHUNK_COLUMNS

NAME = "scale_loss"
_FLOAT = 4
_TILES = 3
"""[b, C] matrices that exist at once while a tile is computed: logits, their exponentials, their gradient."""


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
            "counted": {name: count_bytes(name, batch_size, width, world=world) for name in LOSSES},
            "tiled_formula": tiled_bytes(batch_size, width, world=world),
        }
        rows.append(row)
    return {"world": world, "tile_columns": CHUNK_COLUMNS, "rows": rows}


def count_bytes(loss: str, batch_size: int, width: int, *, world: int) -> int:
    """Peak beside what goes in and its gradient."""
    memory = LiveMemory()
    with fake_world(world, rank=5), FakeTensorMode(), memory:
        images, texts = (torch.empty(batch_size, width, requires_grad=True) for _ in range(2))
        scale = torch.empty((), requires_grad=True)
        bias = torch.empty((), requires_grad=True) if LOSSES[loss].siglip else None
        start = memory.live
        memory.peak = start
        build_loss(LOSSES[loss])(images, texts, scale, bias).backward()
        return memory.peak - 2 * start


def tiled_bytes(batch_size: int, width: int, *, world: int, columns: int = CHUNK_COLUMNS) -> int:
    """NOT BUILT: texts of all ranks, the sum of their gradients, and a few matrices of b x C, in fp32.

    The image features stay where they are; of the columns only [G] sums travel. Source: Cheng et al. 2024 (Inf-CL).
    """
    global_batch = world * batch_size
    gathered = global_batch * width
    tiles = _TILES * batch_size * min(columns, global_batch)
    return _FLOAT * (2 * gathered + tiles + 4 * global_batch)


def tables(result: Result) -> Tables:
    """Markdown by name."""
    body = [
        [
            row["model"],
            row["batch_size"],
            f"{row['global_batch']:,}",
            *(num_bytes(row["counted"][name]) for name in LOSSES),
            num_bytes(row["tiled_formula"]),
        ]
        for row in result["rows"]
    ]
    header = ["model", "b", "global batch", *LOSSES, "CLIP, tiled: formula, not built"]
    return {"loss_memory": table(header, body)}


if __name__ == "__main__":
    run_benchmark(NAME, measure, tables)
