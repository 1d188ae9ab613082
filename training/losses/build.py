"""Chooses the contrastive loss from its flags, and says in words what they do here."""

from __future__ import annotations

from training.config import LossConfig
from training.losses.clip_loss import ClipLoss
from training.losses.contrastive import Loss
from training.losses.siglip_loss import SiglipLoss

LOSS_DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def build_loss(config: LossConfig) -> Loss:
    """The loss that the flags ask for.

    Raises:
        ValueError: an unknown --loss-dist-impl.
    """
    if config.loss_dist_impl is not None and config.loss_dist_impl not in LOSS_DIST_IMPLS:
        raise ValueError(
            f"--loss-dist-impl {config.loss_dist_impl}: unknown; give one of {', '.join(LOSS_DIST_IMPLS)} or leave the "
            "flag out (all of them compute the same exact loss here)"
        )
    return SiglipLoss() if config.siglip else ClipLoss()


def describe_loss(config: LossConfig) -> list[str]:
    """One log line per thing a user of OpenCLIP's flags may not expect; the first names the loss."""
    if config.siglip:
        lines = ["loss: SigLIP (sigmoid) over the global batch, text features gathered with gradient, fp32"]
        if config.local_loss or config.gather_with_grad:
            lines.append("--local-loss and --gather-with-grad have no effect with --siglip, which is always local")
        if config.loss_dist_impl not in (None, "gather"):
            lines.append(f"--loss-dist-impl {config.loss_dist_impl}: computed as 'gather'; all four are the same loss")
        return lines
    lines = ["loss: CLIP (softmax) over the global batch, in tiles, text features gathered with gradient, fp32"]
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
