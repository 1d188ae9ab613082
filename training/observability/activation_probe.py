"""What passes through a model: lengths of the features, and the largest attention logit of each tower.

A forward pass of its own over a few samples: the plain model, without gradient, compilation or dropout. The training
step never sees it, whatever wraps the model there.
Attention logits that grow without bound precede divergence. Source: Dehghani et al. 2023, arXiv 2302.05442.

Legend: S samples, N tokens of a sequence, D width, A heads, K head dim, E embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import Clip
from models.transformer import Attention

logger = logging.getLogger(__name__)


class ActivationProbe:
    """Runs a few samples through a model and measures on the way. No host sync, no collective."""

    def __init__(self, model: Clip, *, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """
        Args:
            autocast: of the run's precision, so that the logits are those of training.
        """
        self._model = model
        self._autocast = autocast
        towers = {"image": model.image_blocks, "text": model.text_blocks}
        self._attention = {tower: _attention_modules(blocks) for tower, blocks in towers.items()}
        for tower, found in self._attention.items():
            if not found:
                logger.info("Telemetry: no attention logits of the %s tower, whose attention is not ours.", tower)

    def measure(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """0-D tensors by name, for images [S, 3, H, W] and texts [S, N]."""
        largest: dict[str, list[Tensor]] = {tower: [] for tower in self._attention}
        with self._undisturbed(), _watched(self._attention, largest):
            features = {"image": self._model.encode_image(images), "text": self._model.encode_text(texts)}
        measured = {f"feature_norm/{tower}": rows.float().norm(dim=-1).mean() for tower, rows in features.items()}
        for tower, logits in largest.items():
            if logits:
                measured[f"attention_logit_max/{tower}"] = torch.stack(logits).amax()
        return measured

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode for a moment: no dropout, so no random numbers; no running statistics."""
        in_training = [module for module in self._model.modules() if module.training]
        # Compiled blocks run as they are: another batch size would be another compilation.
        with torch.no_grad(), self._autocast(), torch.compiler.set_stance("force_eager"):
            for module in in_training:
                module.training = False
            try:
                yield
            finally:
                for module in in_training:
                    module.training = True


def max_attention_logit(attention: Attention, tokens: Tensor) -> Tensor:
    """The largest scaled dot product of a query with a key that it may see: [S, N, D] -> []."""
    samples, length, width = tokens.shape
    # Of the packed projection [3D, D] the queries' and keys' rows.
    projected = F.linear(tokens, attention.in_proj_weight[: 2 * width], attention.in_proj_bias[: 2 * width])
    projected = projected.view(samples, length, 2, attention.heads, -1)  # [S, N, 2D] -> [S, N, 2, A, K]
    query, key = projected.permute(2, 0, 3, 1, 4).float().unbind(0)  # -> 2 x [S, A, N, K]
    with torch.autocast(tokens.device.type, enabled=False):
        logits: Tensor = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # -> [S, A, N, N]
    if attention.causal:
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.amax()


def _attention_modules(blocks: Sequence[nn.Module]) -> list[Attention]:
    return [module for block in blocks for module in block.modules() if isinstance(module, Attention)]


@contextmanager
def _watched(attention: dict[str, list[Attention]], largest: dict[str, list[Tensor]]) -> Iterator[None]:
    """While inside, every attention module adds its largest logit to its tower's list."""

    def watch(tower: str, module: Attention) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Attention)
            largest[tower].append(max_attention_logit(module, inputs[0]))

        return module.register_forward_pre_hook(note)

    handles = [watch(tower, module) for tower, modules in attention.items() for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
