"""The image tower of CLIP: a vision transformer with a class token.

Shapes: B rank batch, H x W pixels, P patch size, N image tokens (class token + patches), D width, E embedding.

    images [B, 3, H, W] -> patches [B, N-1, D] -> tokens [B, N, D] -> blocks -> pooled [B, D] -> features [B, E]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import VisionConfig, as_pair
from models.transformer import BlockOptions, Transformer


class PatchDropout(nn.Module):
    """Keeps a random subset of the patches of each image while training. Source: arXiv 2212.00794."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, 1 + kept, D]; the class token always stays."""
        if not self.training:
            return tokens
        batch, length, width = tokens.shape
        patches = length - 1
        kept = max(1, int(patches * (1 - self.probability)))
        # Drawn where the images are: indices from the CPU would make the device wait in every step.
        scores = torch.randn(batch, patches, device=tokens.device)
        indices = scores.topk(kept, dim=-1).indices + 1  # [B, kept], behind the class token
        chosen = tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, width))  # [B, N, D] -> [B, kept, D]
        return torch.cat([tokens[:, :1], chosen], dim=1)


class VisionTransformer(nn.Module):
    """Images to image features."""

    def __init__(self, config: VisionConfig, *, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        assert isinstance(config.layers, int)
        assert config.patch_size is not None
        self.image_size = config.image_hw
        self.patch_size = as_pair(config.patch_size)
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.pool_type = config.pool_type
        self.final_ln_after_pool = config.final_ln_after_pool
        width = config.width
        options = BlockOptions(
            width=width,
            heads=width // config.head_width,
            mlp_ratio=config.mlp_ratio,
            ls_init_value=config.ls_init_value,
            quick_gelu=quick_gelu,
            act_kwargs=config.act_kwargs,
            norm_kwargs=config.norm_kwargs,
        )
        self.conv1 = nn.Conv2d(3, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid_size[0] * self.grid_size[1] + 1, width))
        self.patch_dropout = PatchDropout(config.patch_dropout) if config.patch_dropout > 0 else nn.Identity()
        self.ln_pre = nn.Identity() if config.no_ln_pre else options.norm()
        self.transformer = Transformer(options, layers=config.layers)
        self.ln_post = options.norm()
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    @property
    def blocks(self) -> nn.ModuleList:
        """The residual blocks, for activation checkpointing and compilation from outside."""
        return self.transformer.resblocks

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E], not normalised."""
        tokens = self.ln_pre(self.patch_dropout(self._embed(images)))  # [B, N, D]
        # The norm acts per token, so a pooled class token needs it on one token only.
        if self.pool_type == "tok":
            pooled = self.ln_post(self.transformer(tokens, read=0))  # [B, N, D] -> [B, D]
        else:
            pooled = self._pool_average(self.transformer(tokens)[:, 1:])
        features: Tensor = pooled @ self.proj  # [B, D] x [D, E] -> [B, E]
        return features

    def _embed(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.image_size:
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} pixels, the model expects {self.image_size}: "
                f"build it with --force-image-size {' '.join(map(str, images.shape[-2:]))}"
            )
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # [B, 3, H, W] -> [B, D, H/P, W/P] -> [B, N-1, D]
        class_token = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)  # [D] -> [B, 1, D]
        tokens = torch.cat([class_token, patches], dim=1)  # -> [B, N, D]
        return tokens + self.positional_embedding.to(tokens.dtype)

    def _pool_average(self, patches: Tensor) -> Tensor:
        """[B, N-1, D] -> [B, D]."""
        if self.final_ln_after_pool:
            return self.ln_post(patches.mean(dim=1))  # type: ignore[no-any-return]
        return self.ln_post(patches).mean(dim=1)  # type: ignore[no-any-return]
