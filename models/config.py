"""What a model is made of: frozen, checked configurations with OpenCLIP's keys. No torch here.

Every key of OpenCLIP 3.3.0 is a field with OpenCLIP's default; unknown keys are refused, and so is what the model code
could not honour.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from models.config_files import REFUSED_SECTIONS, find_model, nearest_names
from models.config_files import list_models as list_models

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_ATTENTION_OPTIONS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")

@dataclass(frozen=True)
class VisionConfig:
    """``vision_cfg`` of OpenCLIP 3.3.0. ``timm_model_name`` set: a timm trunk; four ``layers``: a ModifiedResNet."""

    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | tuple[int, int] | None = 16
    image_size: int | tuple[int, int] = 224

    ls_init_value: float | None = None
    patch_dropout: float = 0.0
    attentional_pool: bool | str = False
    attn_pooler_queries: int = 256
    attn_pooler_heads: int = 8
    no_ln_pre: bool = False
    pos_embed_type: str = "learnable"
    final_ln_after_pool: bool = False
    pool_type: str = "tok"
    output_tokens: bool = False
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None

    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    timm_model_name: str | None = None
    timm_model_pretrained: bool = False
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: float = 0.0
    timm_drop_path: float | None = None

    @property
    def kind(self) -> str:
        """``vit``, ``resnet`` or ``timm``."""
        if self.timm_model_name:
            return "timm"
        return "vit" if isinstance(self.layers, int) else "resnet"

    @property
    def image_hw(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return as_pair(self.image_size)

    @property
    def has_custom_blocks(self) -> bool:
        """True if the attention blocks need an option that only OpenCLIP's own modules have."""
        return _has_custom_blocks(self)


@dataclass(frozen=True)
class TextConfig:
    """``text_cfg`` of OpenCLIP 3.3.0. ``hf_model_name`` set: a Hugging Face encoder."""

    context_length: int = 77
    vocab_size: int = 49408
    hf_tokenizer_name: str | None = None
    tokenizer_mode: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    embed_cls: bool = False
    pad_id: int = 0
    eos_id: int = 2
    no_causal_mask: bool = False
    final_ln_after_pool: bool = False
    pool_type: str = "argmax"
    proj_bias: bool = False
    proj_type: str = "linear"
    output_tokens: bool = False
    act_kwargs: Mapping[str, Any] | None = None
    norm_kwargs: Mapping[str, Any] | None = None

    block_type: str | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False

    hf_model_name: str | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: str | None = "mlp"
    hf_pooler_type: str | None = "mean_pooler"

    @property
    def has_custom_blocks(self) -> bool:
        """True if the attention blocks need an option that only OpenCLIP's own modules have."""
        return _has_custom_blocks(self)


@dataclass(frozen=True)
class ClipConfig:
    """A whole model. ``name`` is where it came from; every other field is a key of the JSON file."""

    embed_dim: int
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    custom_text: bool = False
    quick_gelu: bool = False
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    name: str = ""


_Section = TypeVar("_Section", VisionConfig, TextConfig, ClipConfig)


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes the model's input. ``size`` is (height, width) in pixels."""

    size: tuple[int, int]
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        _check_choice(self.interpolation, ("bicubic", "bilinear", "random"), "--image-interpolation")
        _check_choice(self.resize_mode, ("shortest", "longest", "squash"), "--image-resize-mode")
        for flag, values in (("--image-mean", self.mean), ("--image-std", self.std)):
            if len(values) != 3:
                raise ValueError(f"{flag} needs one value per channel (3), got {len(values)}: {values}")


def load_model_config(name_or_path: str, *, cache_dir: str | None = None) -> ClipConfig:
    """Find a model by name, path or hub address and check every key of its configuration."""
    return parse_model_config(find_model(name_or_path, cache_dir=cache_dir).model_cfg, name=name_or_path)


def parse_model_config(model_cfg: Mapping[str, Any], *, name: str) -> ClipConfig:
    """Turn an OpenCLIP ``model_cfg`` into a checked ClipConfig.

    Raises:
        ValueError: a refused family, a missing or unknown key, or a value that no model can have.
    """
    for section, reason in REFUSED_SECTIONS.items():
        if section in model_cfg:
            raise ValueError(f"model '{name}' has '{section}': {reason}; choose another --model")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys()
    if missing:
        raise ValueError(f"model '{name}' lacks {', '.join(sorted(missing))}: a CLIP model file needs these keys")
    values = dict(model_cfg)
    values["vision_cfg"] = _parse(VisionConfig, values["vision_cfg"], where=f"vision_cfg of model '{name}'")
    values["text_cfg"] = _parse(TextConfig, values["text_cfg"], where=f"text_cfg of model '{name}'")
    # OpenCLIP gives Hugging Face encoders the `text.` layout whatever the file says.
    values["custom_text"] = bool(values.get("custom_text")) or values["text_cfg"].hf_model_name is not None
    config = _parse(ClipConfig, {**values, "name": name}, where=f"model '{name}'")
    check_config(config)
    return config


def check_config(config: ClipConfig) -> None:
    """Refuse what cannot be built or would not be a contrastive model; called again after every override."""
    vision, text = config.vision_cfg, config.text_cfg
    _check_tower(vision, where=f"vision_cfg of model '{config.name}'")
    _check_tower(text, where=f"text_cfg of model '{config.name}'")
    _check_choice(vision.pool_type, ("tok", "avg"), "vision_cfg.pool_type")
    _check_choice(vision.pos_embed_type, ("learnable", "sin_cos_2d"), "vision_cfg.pos_embed_type")
    _check_choice(text.pool_type, ("argmax", "first", "last", "eos"), "text_cfg.pool_type")
    _check_image_size(vision, where=f"model '{config.name}'")
    if isinstance(vision.attentional_pool, str):
        raise ValueError(
            f"vision_cfg of model '{config.name}' has attentional_pool '{vision.attentional_pool}': open_clip 3.3.0 "
            f"marks it as unfinished, and its forward pass fails; use true or false"
        )
    if not 0.0 <= vision.patch_dropout < 1.0:
        raise ValueError(f"patch dropout {vision.patch_dropout} is outside [0, 1): pass another --force-patch-dropout")
    if text.context_length < 1:
        raise ValueError(f"context length {text.context_length} is not positive: pass another --force-context-length")
    if text.embed_cls and not config.custom_text:
        raise ValueError(f"model '{config.name}' has text_cfg.embed_cls, which needs the layout of --force-custom-text")


def _check_tower(tower: VisionConfig | TextConfig, *, where: str) -> None:
    if tower.pool_type == "none" or tower.output_tokens:
        option = "pool_type 'none'" if tower.pool_type == "none" else "output_tokens"
        raise ValueError(f"{where} has {option}: a contrastive model needs one feature per sample, drop the option")
    if tower.scaled_cosine_attn:
        raise ValueError(f"{where} has scaled_cosine_attn: it fails in open_clip 3.3.0's forward pass; use qk_norm")


def _check_image_size(vision: VisionConfig, *, where: str) -> None:
    """A timm trunk checks its own size, when it is built."""
    if vision.kind == "timm":
        return
    height, width = vision.image_hw
    stride = as_pair(vision.patch_size or 16) if vision.kind == "vit" else (32, 32)
    if height % stride[0] or width % stride[1]:
        unit = "patch size" if vision.kind == "vit" else "total stride"
        raise ValueError(
            f"image size {height} x {width} of {where} is not divisible by its {unit} {stride[0]} x {stride[1]}: "
            f"pass --force-image-size with multiples of it"
        )
    if height != width and (vision.kind == "resnet" or vision.pos_embed_type == "sin_cos_2d"):
        raise ValueError(
            f"image size {height} x {width} of {where}: its position embedding is square, "
            f"pass --force-image-size with one number"
        )


def to_open_clip_json(config: ClipConfig) -> dict[str, Any]:
    """The ``model_cfg`` that OpenCLIP reads back: every key that differs from its default."""

    def changed(section: VisionConfig | TextConfig) -> dict[str, Any]:
        defaults = asdict(type(section)())
        return {key: value for key, value in asdict(section).items() if value != defaults[key]}

    result: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {"image_size": config.vision_cfg.image_size} | changed(config.vision_cfg),
        "text_cfg": changed(config.text_cfg),
    }
    defaults = ClipConfig(0, config.vision_cfg, config.text_cfg)
    for key in ("custom_text", "quick_gelu", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"):
        if getattr(config, key) != getattr(defaults, key):
            result[key] = getattr(config, key)
    return result


def as_pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A size given as one number or as (height, width)."""
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    if len(value) != 2:
        raise ValueError(f"an image size is one number or two (height, width), got {value}: see --force-image-size")
    return value[0], value[1]


def _has_custom_blocks(section: VisionConfig | TextConfig) -> bool:
    return section.block_type == "custom" or any(getattr(section, option) for option in _ATTENTION_OPTIONS)


def _parse(cls: type[_Section], values: Mapping[str, Any], *, where: str) -> _Section:
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"unknown key '{key}' in {where}{nearest_names(key, known)}: correct it, or drop it "
                f"(keys newer than OpenCLIP 3.3.0 are not supported)"
            )
    frozen: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
    return cls(**frozen)


def _check_choice(value: str, choices: Collection[str], where: str) -> None:
    if value not in choices:
        raise ValueError(f"{where} '{value}' is none of {', '.join(choices)}")
