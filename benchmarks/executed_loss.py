"""One rank's part of a loss among many ranks, executed with real tensors: memory, products, messages, exactness.

    this rank      B images, B texts                    made up, unit length
    the network    brings the texts of all ranks [G, E]; takes the gradients of all texts [G, E]
    the others     hold the same images: a text's normaliser is W times what this rank's images give it

What is executed is the loss of training, forward and backward. The reference is written out in fp64, chunk by chunk.

Legend: B rank batch, G global batch, W ranks, E embedding, C texts of one chunk.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale_world import LiveMemory, fake_world
from training.config import LossConfig
from training.losses import build_loss

RANK = 5
"""Its own texts are not the first columns."""
SCALE, BIAS = 50.0, -10.0
"""Of a model in the middle of its training."""
_NOISE = 3.0
"""How much longer what differs between an image and its text is than what they share."""
_CHUNK = 4096


class Shape(NamedTuple):
    """What is executed."""

    world: int
    batch_size: int
    width: int

    @property
    def global_batch(self) -> int:
        return self.world * self.batch_size


class Network(TorchDispatchMode):
    """Fills a gather with texts of all ranks, and keeps what a reduce-scatter is given."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own
        self.brought: Tensor | None = None
        self.taken: Tensor | None = None
        self.messages: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__ if func.namespace == "c10d" else ""
        if name == "_allgather_base_":
            self.brought = args[0]
            self._fill(args[0])
        elif name == "_reduce_scatter_base_":
            self.taken = args[1]
        if name:
            self.messages.append(name)
        return result

    def _fill(self, rows: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        for chunk in rows.split(_CHUNK):
            chunk.copy_(F.normalize(torch.randn(chunk.shape, generator=generator)))
        rows[RANK * len(self._own) :][: len(self._own)] = self._own


class Multiplications(TorchDispatchMode):
    """Of matrix products, in-place ones among them, which torch's own counter leaves out."""

    _FACTORS: Mapping[str, int] = {"mm": 0, "addmm": 1, "addmm_": 1}
    """By name: which argument is the first factor; the second follows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        place = self._FACTORS.get(func.overloadpacket.__name__)
        if place is not None:
            self.count += args[place].numel() * args[place + 1].shape[1]
        return func(*args, **(kwargs or {}))


def execute(config: LossConfig, shape: Shape, *, check: bool) -> dict[str, Any]:
    """Forward and backward once.

    Args:
        check: against the reference, which takes longer than what it checks.
    """
    images, texts, scale, bias = _inputs(shape)
    kept: list[int] = []

    def note(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    memory, multiplications = LiveMemory(), Multiplications()
    with fake_world(shape.world, rank=RANK), Network(texts.detach()) as network, memory, multiplications:
        resident = _reset_peak_resident()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
            loss = build_loss(config)(images, texts, scale, bias)
        between = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
    pairs = shape.batch_size * shape.global_batch
    found = {
        **shape._asdict(),
        "global_batch": shape.global_batch,
        "loss": loss.item(),
        "messages": network.messages,
        "peak_tensor_bytes": memory.peak,
        "peak_resident_bytes": _peak_resident() - resident,
        "largest_kept_elements": max(kept),
        "pairs": pairs,
        "products": multiplications.count / (pairs * shape.width),
        "forward_s": round(between - start, 2),
        "backward_s": round(end - between, 2),
    }
    if check:
        assert network.brought is not None
        assert network.taken is not None
        assert scale.grad is not None
        exact = reference(config, images, network.brought, world=shape.world, of_texts=network.taken)
        found["relative_errors"] = {
            "loss": abs(loss.item() / exact.loss - 1),
            "images": _relative(images.grad, exact.images),
            "texts": exact.texts_error,
            "scale": abs(scale.grad.item() / exact.scale - 1),
        }
    return found


class Exact(NamedTuple):
    """In fp64, of one rank's part."""

    loss: float
    images: Tensor
    """Gradient, [B, E]."""
    scale: float
    """Gradient."""
    texts_error: float
    """Of the gradients of all texts that the rank has sent, relative to their norm."""


def reference(config: LossConfig, images: Tensor, rows: Tensor, *, world: int, of_texts: Tensor) -> Exact:
    """The loss as its paper defines it, without tiles of training's and without its arithmetic.

    Args:
        rows: all texts [G, E], as the network has brought them.
        of_texts: gradients of all texts [G, E], to compare.
    """
    images = images.detach().double()
    own = torch.arange(len(images)) + RANK * len(images)
    total, of_rows, of_columns = _normalisers(config, images, rows, own=own, world=world)
    of_images, of_scale, wrong, right = torch.zeros_like(images), 0.0, 0.0, 0.0
    for first, texts, cosines in _chunks(images, rows):
        logits = SCALE * cosines + BIAS
        is_pair = (own[:, None] == torch.arange(first, first + len(texts))[None]).double()  # [B, C]
        if config.siglip:
            slope = torch.sigmoid(logits) - is_pair
        else:
            columns = of_columns[first : first + len(texts)]
            slope = (torch.exp(logits - of_rows[:, None]) + torch.exp(logits - columns) - 2 * is_pair) / 2
        slope /= len(images)
        of_images += SCALE * slope @ texts
        of_scale += (slope * cosines).sum().item()
        expected = SCALE * slope.T @ images
        wrong += (of_texts[first : first + len(texts)] - expected).square().sum().item()
        right += expected.square().sum().item()
    return Exact(total, of_images, of_scale, math.sqrt(wrong / right))


def _normalisers(
    config: LossConfig, images: Tensor, rows: Tensor, *, own: Tensor, world: int
) -> tuple[float, Tensor, Tensor]:
    """The loss; for the softmax also the logarithms of the sums over rows [B] and columns [G]."""
    of_rows, of_columns, pairs = [], [], torch.zeros(len(images), dtype=torch.float64)
    total = 0.0
    for first, texts, cosines in _chunks(images, rows):
        logits = SCALE * cosines + BIAS
        inside = (own >= first) & (own < first + len(texts))
        pairs[inside] = logits[inside, own[inside] - first]
        if config.siglip:
            total += torch.log1p(torch.exp(-logits.abs())).sum().item() + logits.clamp(min=0).sum().item()
        else:
            of_rows.append(logits.logsumexp(dim=1))
            of_columns.append(logits.logsumexp(dim=0) + math.log(world))
    if config.siglip:
        return (total - pairs.sum().item()) / len(images), pairs, pairs
    rows_sum, columns_sum = torch.stack(of_rows).logsumexp(dim=0), torch.cat(of_columns)
    return (rows_sum + columns_sum[own] - 2 * pairs).mean().item() / 2, rows_sum, columns_sum


def _chunks(images: Tensor, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for first in range(0, len(rows), _CHUNK):
        texts = rows[first : first + _CHUNK].double()
        yield first, texts, images @ texts.T  # [B, E] x [E, C] -> [B, C]


def _inputs(shape: Shape) -> list[Tensor]:
    """Features of pairs that belong together, scale and bias: leaves."""
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, shape.batch_size, shape.width, generator=generator)
    features = F.normalize(images), F.normalize(images + _NOISE * noise)
    return [value.requires_grad_() for value in (*features, torch.tensor(SCALE), torch.tensor(BIAS))]


def _relative(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return float((found - expected).norm() / expected.norm())


def _reset_peak_resident() -> int:
    """Linux: from now on the peak is counted anew. Returns what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_resident() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
