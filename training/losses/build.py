"""Chooses the contrastive loss from its flags, and says in words what they do here."""

from __future__ import annotations

import torch

from training.config import LossConfig
from training.losses.clip_loss import ClipLoss
from training.losses.contrastive import Loss
from training.losses.siglip_loss import SiglipLoss

LOSS_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
GATHER_DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
"""By --gather-dtype: what features are rounded to for the network. They are fp32, or wider, already."""


def build_loss(config: LossConfig) -> Loss:
    """The loss that the flags ask for.

    Raises:
        ValueError: an unknown --loss-dist-impl or --gather-dtype.
    """
    if config.loss_dist_impl is not None and config.loss_dist_impl not in LOSS_DIST_IMPLS:
        raise ValueError(
            f"--loss-dist-impl {config.loss_dist_impl}: unknown; give one of {', '.join(LOSS_DIST_IMPLS)} or leave the "
            "flag out (all of them compute the same exact loss here)"
        )
    if config.gather_dtype not in GATHER_DTYPES:
        raise ValueError(f"--gather-dtype {config.gather_dtype}: unknown; give one of {', '.join(GATHER_DTYPES)}")
    loss = SiglipLoss if config.siglip else ClipLoss
    return loss(gather_dtype=GATHER_DTYPES[config.gather_dtype])


def describe_loss(config: LossConfig, *, world_size: int) -> list[str]:
    """One log line per thing a user may not expect; the first names the loss."""
    name = "SigLIP (sigmoid)" if config.siglip else "CLIP (softmax)"
    lines = [f"loss: {name} over the global batch, in tiles, text features gathered with gradient, fp32"]
    rounds = GATHER_DTYPES[config.gather_dtype] is not None
    if world_size == 1:
        # The other remarks are about several ranks.
        return [*lines, "--gather-dtype bf16 has no effect: one process gathers nothing"] if rounds else lines
    if rounds:
        lines.append(
            "--gather-dtype bf16: text features are rounded to bf16 for the gather, half of its bytes; their gradients "
            "come back in fp32"
        )
    return lines + _remarks(config)


def _remarks(config: LossConfig) -> list[str]:
    """On flags of OpenCLIP that mean something else here."""
    lines = []
    if config.siglip:
        if config.local_loss or config.gather_with_grad:
            lines.append("--local-loss and --gather-with-grad have no effect with --siglip, which is always local")
        if config.loss_dist_impl not in (None, "gather"):
            lines.append(f"--loss-dist-impl {config.loss_dist_impl}: computed as 'gather'; all four are the same loss")
        return lines
    if not config.gather_with_grad:
        lines.append(
            "features are gathered with gradient although --gather-with-grad is not given: without it the gradients "
            "of the towers would be those of another loss (scaled by 1/world size, or wrong with --local-loss)"
        )
    if not config.local_loss:
        lines.append("the loss is local although --local-loss is not given: same gradients, less memory and time")
    if config.loss_dist_impl is not None:
        lines.append("--loss-dist-impl has no effect without --siglip")
    return lines
