"""Contrastive losses over the global batch."""

from training.losses.build import build_loss, describe_loss
from training.losses.contrastive import Loss

__all__ = ["Loss", "build_loss", "describe_loss"]
