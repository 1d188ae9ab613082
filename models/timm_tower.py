"""An image tower with any timm trunk, under OpenCLIP's projection head.

``trunk`` and ``head`` and everything below them have the names of OpenCLIP's adapter, so that checkpoints agree.
Shapes: B rank batch, F trunk features, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import timm
from timm.layers import AttentionPool2d, Mlp, RotAttentionPool2d
from torch import Tensor, nn

from models.config import VisionConfig

# Where timm keeps repeated blocks: `blocks` in ViT, EVA, ConvNeXt, FastViT and Swin, `layer1` to `layer4` in ResNets.
_BLOCK_CONTAINERS = ("blocks", "layer1", "layer2", "layer3", "layer4")
_ATTENTION_POOLS = ("abs_attn", "rot_attn")


class TimmTower(nn.Module):
    """Images to image features through a timm trunk."""

    def __init__(self, config: VisionConfig, *, embed_dim: int) -> None:
        super().__init__()
        if config.timm_proj not in (None, "", "none", "linear", "mlp"):
            raise ValueError(f"vision_cfg.timm_proj '{config.timm_proj}' is none of linear, mlp, none and ''")
        self.image_size = config.image_hw
        self.trunk = _build_trunk(config, embed_dim=embed_dim)
        self.head = _build_head(config, trunk=self.trunk, embed_dim=embed_dim)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of all stages in one list, for activation checkpointing and compilation from outside."""
        return timm_blocks(self.trunk)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, F] -> [B, E], not normalised."""
        features: Tensor = self.head(self.trunk(images))
        return features

    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Make the trunk expect another image size; position embeddings are resampled, convolutions need nothing.

        Raises:
            ValueError: the trunk's patches do not tile the image.
        """
        patch_size = getattr(getattr(self.trunk, "patch_embed", None), "patch_size", None)
        if patch_size is not None and any(size % step for size, step in zip(image_size, patch_size, strict=True)):
            raise ValueError(
                f"image size {image_size} is not divisible by the patch size {tuple(patch_size)} of the timm trunk: "
                f"pass --force-image-size with multiples of {tuple(patch_size)}"
            )
        self.image_size = image_size
        if hasattr(self.trunk, "set_input_size"):
            cast(Any, self.trunk).set_input_size(image_size)


    def check_image_size(self) -> None:
        """Compare the configured image size with what the trunk was built for.

        Raises:
            ValueError: a trunk of fixed size expects another one.
        """
        patch_embed = getattr(self.trunk, "patch_embed", None)
        expected = getattr(patch_embed, "img_size", None)
        if getattr(patch_embed, "strict_img_size", False) and tuple(expected or ()) != self.image_size:
            raise ValueError(
                f"the model is configured for images of {self.image_size}, its timm trunk for {expected}: "
                f"pass --force-image-size"
            )


def timm_blocks(trunk: nn.Module) -> list[nn.Module]:
    """The outermost repeated blocks of a trunk, in the order of the forward pass; empty if it has none."""
    found: list[tuple[str, nn.Module]] = []
    for name, container in trunk.named_modules():
        is_container = isinstance(container, nn.Sequential | nn.ModuleList)
        if not is_container or name.rsplit(".", 1)[-1] not in _BLOCK_CONTAINERS:
            continue
        if not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.extend((f"{name}.{child_name}", child) for child_name, child in container.named_children())
    return [block for _, block in found]


def _build_trunk(config: VisionConfig, *, embed_dim: int) -> nn.Module:
    """The trunk with OpenCLIP's choice of classifier and pooling; timm draws its weights with a classifier first."""
    options: dict[str, Any] = {}
    if config.timm_drop_path is not None:
        options["drop_path_rate"] = config.timm_drop_path
    if config.patch_dropout > 0:
        options["patch_drop_rate"] = config.patch_dropout
    own_pool = config.timm_pool in _ATTENTION_POOLS
    if config.timm_proj not in ("linear", "mlp") and not own_pool:
        # No head of ours: timm's classifier is the projection, or "none" passes the pooled features through.
        options["num_classes"] = 0 if config.timm_proj == "none" else embed_dim
        options["global_pool"] = config.timm_pool
        return cast(nn.Module, _create(config, options))
    trunk = _create(config, options)
    if own_pool:
        trunk.reset_classifier(0, global_pool="")
    elif config.timm_pool:
        trunk.reset_classifier(0, global_pool=config.timm_pool)
    else:
        trunk.reset_classifier(0)  # the family's own pooling
    return cast(nn.Module, trunk)


def _create(config: VisionConfig, options: dict[str, Any]) -> Any:
    name = config.timm_model_name
    try:
        return timm.create_model(cast(str, name), pretrained=config.timm_model_pretrained, **options)
    except TypeError as error:
        # timm passes options on to the model class, and not every class knows every option.
        raise ValueError(
            f"timm model '{name}' does not accept {options} ({error}): drop --force-patch-dropout, or timm_drop_path "
            f"from vision_cfg"
        ) from error


def _build_head(config: VisionConfig, *, trunk: nn.Module, embed_dim: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    features = cast(int, trunk.num_features)
    if config.timm_pool == "abs_attn":
        grid = cast(Any, trunk).default_cfg.get("pool_size")
        layers["pool"] = AttentionPool2d(features, feat_size=grid, out_features=embed_dim)
        features = embed_dim
    elif config.timm_pool == "rot_attn":
        layers["pool"] = RotAttentionPool2d(features, out_features=embed_dim)
        features = embed_dim
    if config.timm_proj == "linear":
        layers["drop"] = nn.Dropout(config.timm_drop)
        layers["proj"] = nn.Linear(features, embed_dim, bias=config.timm_proj_bias)
    elif config.timm_proj == "mlp":
        bias, drop = (True, config.timm_proj_bias), (config.timm_drop, 0.0)
        layers["mlp"] = Mlp(features, 2 * embed_dim, embed_dim, drop=drop, bias=bias)
    return nn.Sequential(layers)
