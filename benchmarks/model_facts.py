"""Writes slurm/model_facts.json: size, cost and activation memory of every built-in model, counted without a GPU.

    python -m benchmarks.model_facts            all models, about ten minutes on one core
    python -m benchmarks.model_facts ViT-B-32   prints the row of one model, writes nothing

``clipyard submit`` plans from this file, because a login node need not have torch. Activations are what autograd keeps
for the backward pass under bf16 autocast, counted by hooks on tensors without memory. Two batch sizes are compared, so
that what does not grow with the batch (weights cast to bf16) drops out. What kernels need in between is not counted.
Activations are those of the code as it trains, last blocks where they are read, but with captions as long as the
context: what a batch may need at most. Multiply-accumulates are those of the whole model, as they are published and as
published shares of a GPU's peak count them.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from models.clip import Clip
from models.config import ClipConfig, list_models, load_model_config
from models.factory import build_model
from models.transformer import Transformer

FACTS = Path(__file__).resolve().parent.parent / "slurm" / "model_facts.json"
# Not so small that a kernel is chosen which larger batches would not use.
_BATCHES = (8, 16)


class Activations(NamedTuple):
    """Bytes per sample that a forward pass keeps for the backward pass."""

    plain: float
    checkpointed: float
    """With --grad-checkpointing: inputs of the blocks, the largest block's own, and what lies outside of blocks."""


class CudaAutocastPolicy(TorchFunctionMode):
    """What autocast computes in fp32 on CUDA and not on the CPU, and what is therefore kept in fp32."""

    _FLOAT32 = frozenset({F.layer_norm, torch.layer_norm, F.group_norm, F.softmax, torch.softmax})

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FLOAT32:
            args = [_widened(value) for value in args]
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _SavedBytes:
    """Sums what autograd saves, each storage once, in all and by block. Not the weights themselves."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        # Kept alive, because a freed storage's address may be used again.
        self._known = {_storage(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._block: int | None = None
        self.total = 0
        self.inputs = 0
        self.by_block = [0] * len(blocks)

    def measure(self, forward: Callable[[], Tensor]) -> None:
        handles = []
        for index, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(lambda _, inputs, index=index: self._enter(index, inputs)))
            handles.append(block.register_forward_hook(lambda *_: self._leave()))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        with autocast, CudaAutocastPolicy(), torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved):
            forward()
        for handle in handles:
            handle.remove()

    def checkpointed(self) -> int:
        """As if blocks kept their inputs only and were computed again, one at a time."""
        return self.total - sum(self.by_block) + self.inputs + max(self.by_block, default=0)

    def _save(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._known:
            self._known[_storage(tensor)] = tensor
            size = tensor.untyped_storage().nbytes()
            self.total += size
            if self._block is not None:
                self.by_block[self._block] += size
        return tensor

    def _enter(self, index: int, inputs: Sequence[Any]) -> None:
        self._block = index
        self.inputs += sum(value.untyped_storage().nbytes() for value in inputs if isinstance(value, Tensor))

    def _leave(self) -> None:
        self._block = None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def model_facts(name: str) -> dict[str, Any]:
    """One row of the file.

    Raises:
        ValueError: a model that cannot be built or run without memory.
    """
    config = load_model_config(name)
    if config.text_cfg.hf_model_name is not None:
        raise ValueError(f"the text tower {config.text_cfg.hf_model_name} cannot run without memory")
    model = build_model(config, device="meta")
    image_macs, text_macs = _count_macs(model.eval(), config)
    blocks = [*model.image_blocks, *model.text_blocks]
    image, text = _count_activations(model.train(), config)
    return {
        "parameters": _num_parameters(model),
        "image_parameters": _num_parameters(model.visual),
        "largest_block_parameters": max((_num_parameters(block) for block in blocks), default=0),
        "block_parameters": sum(_num_parameters(block) for block in blocks),
        "image_gmac": round(image_macs / 1e9, 4),
        "text_gmac": round(text_macs / 1e9, 4),
        "image_mb": round(image.plain / 1e6, 3),
        "text_mb": round(text.plain / 1e6, 3),
        "image_checkpointed_mb": round(image.checkpointed / 1e6, 3),
        "text_checkpointed_mb": round(text.checkpointed / 1e6, 3),
        "image_hw": list(config.vision_cfg.image_hw),
        "context_length": config.text_cfg.context_length,
        "embed_dim": config.embed_dim,
    }


def _count_macs(model: Clip, config: ClipConfig) -> tuple[int, int]:
    """(image tower, text tower) of one sample. As models/profile.py, which cannot count pooling by learned queries."""
    images = torch.empty(1, 3, *config.vision_cfg.image_hw, device="meta")
    texts = torch.zeros(1, config.text_cfg.context_length, dtype=torch.int64, device="meta")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter's hooks want a gradient function of whatever could have one
    compute_last_blocks(model, whole=True)
    towers: tuple[Callable[[], Tensor], ...] = (lambda: model.encode_image(images), lambda: model.encode_text(texts))
    flops = []
    for encode in towers:
        with FlopCounterMode(display=False) as counter:
            encode()
        flops.append(int(counter.get_total_flops()))
    compute_last_blocks(model, whole=False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return flops[0] // 2, flops[1] // 2


def compute_last_blocks(model: nn.Module, *, whole: bool) -> None:
    """For all tokens, or for those that are read."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.whole_last_block = whole


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_activations(model: Clip, config: ClipConfig) -> tuple[Activations, Activations]:
    """(image tower, text tower)."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # timm and autocast remark on what is meant so here
        to_fake_cpu(model)

        def images(batch: int) -> Tensor:
            return model.encode_image(torch.empty(batch, 3, *config.vision_cfg.image_hw))

        def texts(batch: int) -> Tensor:
            return model.encode_text(torch.zeros(batch, config.text_cfg.context_length, dtype=torch.int64))

        return (
            _per_sample(model, list(model.image_blocks), images),
            _per_sample(model, list(model.text_blocks), texts),
        )


def _per_sample(model: Clip, blocks: Sequence[nn.Module], encode: Callable[[int], Tensor]) -> Activations:
    counts = []
    for batch in _BATCHES:
        saved = _SavedBytes(model, blocks)
        saved.measure(lambda batch=batch: encode(batch))  # type: ignore[misc]
        counts.append((saved.total, saved.checkpointed()))
    (plain, checkpointed), (more_plain, more_checkpointed) = counts
    difference = _BATCHES[1] - _BATCHES[0]
    return Activations((more_plain - plain) / difference, (more_checkpointed - checkpointed) / difference)


def to_fake_cpu(model: nn.Module) -> None:
    """From meta to CPU tensors without memory: autocast does nothing on meta."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def all_facts() -> dict[str, Any]:
    """The content of the file: ``models`` by name, and ``unknown`` with the reason."""
    models: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for name in list_models():
        try:
            models[name] = model_facts(name)
        except Exception as error:  # whatever a model's code cannot do without memory, the others are counted
            unknown[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        sys.stderr.write(f"{name}: {'not counted: ' + unknown[name] if name in unknown else 'counted'}\n")
    return {"models": models, "unknown": unknown}


def write_facts(facts: Mapping[str, Any], path: Path) -> None:
    """One line per model, so that a change shows which."""
    parts = []
    for section in ("models", "unknown"):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(facts[section].items()))
        parts.append(f" {json.dumps(section)}: {{\n{rows}\n }}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(argv: Sequence[str]) -> int:
    """Prints the rows of the models named; without a name writes the file."""
    for name in argv:
        sys.stdout.write(f"{json.dumps({name: model_facts(name)})}\n")
    if not argv:
        write_facts(all_facts(), FACTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
