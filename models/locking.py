"""Freezing towers: what ``--lock-image`` and ``--lock-text`` leave trainable.

Groups count from the top, as in OpenCLIP 3.3.0:

    image (ViT)  [conv1, class and position embeddings, ln_pre]  block ...  [last block, ln_post]  [proj]
    image (timm) the trunk's own groups; the projection head on top of it always stays trainable
    text         [token and position embeddings]                 block ...  [last block, ln_final] [text_projection]

Source: LiT, arXiv 2111.07991.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch.nn.functional as F
from timm.models import group_modules, group_parameters
from torch import Tensor, nn

from models.clip import Clip
from models.hf_text_tower import is_hf_text_tower
from models.timm_tower import TimmTower

_Part = nn.Module | nn.Parameter


class FrozenBatchNorm(nn.Module):
    """Batch norm that always uses its running statistics.

    Same parameters, buffers and names as the layer that it replaces, so checkpoints are unaffected; not a subclass,
    so conversion to synchronised batch norm leaves it alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        # timm fuses dropout and activation into the norm; they hold no parameters.
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        mean, var = self.running_mean, self.running_var
        normed = F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)
        activated: Tensor = self.act(self.drop(normed))
        return activated


def lock_image_tower(model: Clip, *, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
    """Freeze the image tower except its last ``unlocked_groups`` groups.

    Raises:
        ValueError: a negative count, or groups of a tower that has none.
    """
    _check_count(unlocked_groups, "--lock-image-unlocked-groups")
    if isinstance(model.visual, TimmTower):
        _lock_timm_trunk(model.visual.trunk, unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)
        return
    visual: Any = model.visual
    is_vit = hasattr(visual, "class_embedding")
    if unlocked_groups and not is_vit:
        raise ValueError(
            f"--lock-image-unlocked-groups {unlocked_groups}: the ModifiedResNet of '{model.config.name}' has no "
            f"groups; pass 0, or a ViT or timm --model"
        )
    _set_trainable([visual], False)
    if freeze_bn_stats:
        freeze_batch_norms(visual)
    if is_vit:
        first: list[_Part] = [visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre]
        groups = [first, *_block_groups(model.image_blocks, visual.ln_post), [visual.proj]]
        _unlock(groups, unlocked_groups)


def lock_text_tower(model: Clip, *, unlocked_layers: int = 0, freeze_layer_norm: bool = False) -> None:
    """Freeze the text tower except its last ``unlocked_layers`` groups; layer norms stay trainable unless asked.

    Raises:
        ValueError: a negative count.
    """
    _check_count(unlocked_layers, "--lock-text-unlocked-layers")
    text: Any = model.text if model.config.custom_text else model
    if is_hf_text_tower(text):
        text.lock(unlocked_layers, freeze_layer_norm)  # open_clip's adapter knows the layers of each architecture
        return
    embeddings: list[_Part] = [text.token_embedding, text.positional_embedding]
    if getattr(text, "cls_emb", None) is not None:
        embeddings.append(text.cls_emb)
    groups = [embeddings, *_block_groups(model.text_blocks, text.ln_final)]
    if text.text_projection is not None:
        groups.append([text.text_projection])
    for group in groups:
        _set_trainable(group, False)
    if not freeze_layer_norm:
        for module in (*model.text_blocks, text.ln_final):
            _set_trainable([norm for norm in module.modules() if isinstance(norm, nn.LayerNorm)], True)
    _unlock(groups, unlocked_layers)


def freeze_batch_norms(module: nn.Module, *, only: set[str] | None = None, prefix: str = "") -> None:
    """Replace the batch norms below a module by frozen ones; ``only`` restricts it to these full names."""
    for name, child in list(module.named_children()):
        full_name = f"{prefix}{name}"
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if only is None or full_name in only:
                setattr(module, name, FrozenBatchNorm(child))
        else:
            freeze_batch_norms(child, only=only, prefix=f"{full_name}.")


def _lock_timm_trunk(trunk: nn.Module, *, unlocked_groups: int, freeze_bn_stats: bool) -> None:
    if not unlocked_groups:
        _set_trainable([trunk], False)
        if freeze_bn_stats:
            freeze_batch_norms(trunk)
        return
    matcher = cast(Any, trunk).group_matcher()
    parameters = group_parameters(trunk, matcher)
    last_locked = max(parameters) - unlocked_groups
    for group, names in parameters.items():
        if group <= last_locked:
            _set_trainable([trunk.get_parameter(name) for name in names], False)
    if freeze_bn_stats:
        modules = group_modules(trunk, matcher, reverse=True)
        freeze_batch_norms(trunk, only={name for name, group in modules.items() if group <= last_locked})


def _block_groups(blocks: Sequence[nn.Module], norm: nn.Module) -> list[list[_Part]]:
    """One group per block; the norm on top belongs to the last one."""
    groups: list[list[_Part]] = [[block] for block in blocks]
    groups[-1].append(norm)
    return groups


def _check_count(count: int, flag: str) -> None:
    if count < 0:
        raise ValueError(f"{flag} {count} is negative: pass the number of groups, from the top, that stay trainable")


def _unlock(groups: Sequence[Sequence[_Part]], count: int) -> None:
    for group in groups[max(0, len(groups) - count) :]:
        _set_trainable(group, True)


def _set_trainable(parts: Sequence[_Part], trainable: bool) -> None:
    for parameter in _parameters(parts):
        parameter.requires_grad = trainable


def _parameters(parts: Sequence[_Part]) -> Iterator[nn.Parameter]:
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()
