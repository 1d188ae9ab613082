"""What can be counted of a training step without a clock: FLOPs, products, tokens, traffic, programs, differences.

Each function counts one thing in the real code, or in OpenCLIP's own modules. counts.py has the gates over them.

Legend: B rank batch, G global batch, E embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.batches import caption_lengths
from benchmarks.open_clip_models import borrow_weights, build_open_clip, open_clip_inputs
from benchmarks.scale_loss import FORMS, count_bytes
from benchmarks.scale_world import fake_world
from benchmarks.training_flops import count_flops, ending_at
from models.factory import create_model
from models.packing import PackedTexts, pack_texts
from training.config import EngineConfig, LossConfig
from training.distributed.parallelize import parallelize
from training.distributed.runtime import Runtime
from training.losses import build_loss
from training.losses.tiles import TILE_ELEMENTS

TINY = "demo-vit"
OUR_LOSS = "CLIP"
THEIR_LOSS = "softmax, stored logits of local rows"
"""OpenCLIP's with --local-loss --gather-with-grad, the cheaper of its two forms."""
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class _Watch(TorchDispatchMode):
    """Calls a function with each operation and the tensors it makes."""

    def __init__(self, seen: Callable[[str, list[Tensor]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._seen(func.overloadpacket.__name__, made)
        return result


def open_clip_flops(model_name: str) -> int:
    """FLOPs of a forward and backward pass of OpenCLIP's modules, per pair of full caption length."""
    model = build_open_clip(model_name)
    images, texts = open_clip_inputs(model, 1, device="meta")

    def forward() -> Tensor:
        image_features, text_features, *_ = model(images, texts)
        total: Tensor = image_features.sum() + text_features.sum()
        return total

    return count_flops(forward)


def tokens_per_real_token(batches: Sequence[Sequence[int]], context_length: int) -> float:
    """Tokens that the text tower computes, fillers included, for each token of a caption."""
    computed = sum(len(pack_texts(ending_at(lengths, context_length)).tokens) for lengths in batches)
    return computed / sum(map(sum, batches))


class Products(NamedTuple):
    """Matrix products of one block's forward pass; attention, one operation, is none of them."""

    block: int
    last_block: int
    """Of a tower that reads one token: its query is a product of its own."""
    open_clip: int


def products_per_block() -> Products:
    """Of the image tower; those of the text tower are the same."""
    model, config, _ = create_model(TINY)
    block = model.image_blocks[0]
    tokens = torch.zeros(2, 5, config.vision_cfg.width)
    reference = build_open_clip(TINY).visual.transformer.resblocks[0].to_empty(device="cpu")
    return Products(
        _count_products(lambda: block(tokens)),
        _count_products(lambda: block(tokens, None, 0)),
        _count_products(lambda: reference(tokens)),
    )


def _count_products(forward: Callable[[], Any]) -> int:
    names: Counter[str] = Counter()
    with _Watch(lambda name, _: names.update([name])):
        forward()
    return sum(names[name] for name in _PRODUCTS)


def gathered_units(form: str, *, world: int = 64) -> float:
    """What the loss exchanges of features and their gradients, in units of the global batch's features of one tower."""
    batch_size, width = 4, 8
    with fake_world(world) as (_, log):
        _step_of_loss(form, batch_size, width)
    unit = 4 * world * batch_size * width
    calls = [call for call in log.calls if call.kind in ("all_gather", "reduce_scatter")]
    return sum(call.num_bytes for call in calls) / unit


def large_tensors_of_loss(form: str, *, world: int = 64, batch_size: int = 1024) -> int:
    """Tensors of more than a tile's numbers that loss and backward pass make. B x G is eight tiles."""
    found: list[int] = []

    def seen(_: str, made: list[Tensor]) -> None:
        found.extend(tensor.numel() for tensor in made if tensor.numel() > TILE_ELEMENTS)

    with fake_world(world), FakeTensorMode(), _Watch(seen):
        _step_of_loss(form, batch_size, 8)
    return len(found)


def memory_of_loss(form: str, *, world: int = 1024, batch_size: int = 1024) -> float:
    """Peak of loss and backward pass, in units of an fp32 matrix of B x G: also of one kept in many tiles."""
    return count_bytes(form, batch_size, 8, world=world) / (4 * world * batch_size**2)


def _step_of_loss(form: str, batch_size: int, width: int) -> None:
    images, texts = (torch.ones(batch_size, width, requires_grad=True) for _ in range(2))
    scale, bias = (torch.ones((), requires_grad=True) for _ in range(2))
    FORMS[form](images, texts, scale, bias).backward()


class Programs(NamedTuple):
    """What torch.compile made of blocks over many batches."""

    first: int
    """Graphs after the first batch: two towers, the last block of each."""
    graph_breaks: int
    recompiles: int
    """Graphs that later batches added."""


def programs_of_batches(*, batches: int = 50, batch_size: int = 24) -> Programs:
    """Of random batches with captions as long as web alt-texts are, forward and backward."""
    model, config, _ = create_model(TINY)
    engine = EngineConfig(device="cpu", torchcompile=True, torchcompile_backend="eager")
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    trained = parallelize(model.train(), config=engine, runtime=runtime)
    generator, context = torch.Generator().manual_seed(0), config.text_cfg.context_length
    images = torch.randn(batch_size, 3, *config.vision_cfg.image_hw, generator=generator)
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for _ in range(batches):
        lengths = caption_lengths(batch_size, context_length=context, generator=generator).tolist()
        trained(images, pack_texts(ending_at(lengths, context))).text_features.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    return Programs(graphs[0], sum(counters["graph_break"].values()), graphs[-1] - graphs[0])


class Difference(NamedTuple):
    """From OpenCLIP, relative to its largest number."""

    features: float
    gradients: float
    """The largest of all parameters."""


def difference_from_open_clip(model_name: str, *, dtype: torch.dtype = torch.float64) -> Difference:
    """Features and gradients of the contrastive loss, our texts packed and theirs padded, the same weights."""
    torch.manual_seed(0)
    built = create_model(model_name)
    model, config = built.model.to(dtype).train(), built.config
    reference = build_open_clip(model_name)
    borrow_weights(reference, model)
    context = config.text_cfg.context_length
    texts = _captions([context // 9, context], context)
    images = torch.randn(len(texts), 3, *config.vision_cfg.image_hw).to(dtype)
    ours = _features_and_gradients(model, build_loss(LossConfig()), images, pack_texts(texts))
    theirs = _features_and_gradients(reference, open_clip.ClipLoss(), images, texts)
    apart = {name: _apart(ours[name], theirs[name]) for name in theirs}
    assert ours.keys() == theirs.keys()
    features = max(apart.pop(name) for name in _FEATURES)
    return Difference(features, max(apart.values()))


_FEATURES = ("image_features", "text_features")


def _captions(lengths: Sequence[int], context_length: int) -> Tensor:
    words = torch.randint(1, 400, (len(lengths), context_length))
    last = ending_at(lengths, context_length).bool()
    return torch.where(last, 49_407, words * (last.int().cumsum(1) == 0))


def _features_and_gradients(
    model: nn.Module, loss: Callable[..., Tensor], images: Tensor, texts: Tensor | PackedTexts
) -> dict[str, Tensor]:
    image_features, text_features, scale, *_ = model(images, texts)
    loss(image_features, text_features, scale, None).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients | dict(zip(_FEATURES, (image_features.detach(), text_features.detach()), strict=True))


def _apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
