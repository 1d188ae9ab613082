"""Captions to token ids, with the tokenizer that a model's configuration names.

Shapes: n texts, L text tokens (the context length).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from models.clip_bpe import CLEAN_MODES, ClipBpe
from models.config import ClipConfig
from models.config_files import HF_HUB, LOCAL_DIR

# open_clip is imported where one of its tokenizers is built: loader workers with CLIP's own do not pay 3 s and 200 MB.

# open_clip's BPE keeps every word it has ever seen; a loader worker that runs for weeks must not.
_MAX_CACHED_WORDS = 1 << 18

_Encode = Callable[[list[str]], Tensor]


class Tokenizer:
    """Texts to int64 ids [n, L], padded, cut at the context length with the end token kept.

    Pickles as its configuration, so that a loader worker builds its own tables.
    """

    def __init__(self, config: ClipConfig, *, cache_dir: str | None = None) -> None:
        self._config = config
        self._cache_dir = cache_dir
        self.context_length = config.text_cfg.context_length
        self._encode = _build(config, cache_dir=cache_dir)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode a list of texts (or one text) -> int64 [n, L]."""
        ids: Tensor = self._encode([texts] if isinstance(texts, str) else list(texts))
        self._bound_cache()
        return ids.long()

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[ClipConfig, str | None]]:
        return _rebuild, (self._config, self._cache_dir)

    def _bound_cache(self) -> None:
        cache: dict[str, str] | None = getattr(self._encode, "cache", None)
        if cache is not None and len(cache) > _MAX_CACHED_WORDS:
            special = {word: merged for word, merged in cache.items() if word == merged}
            cache.clear()
            cache.update(special)


def build_tokenizer(config: ClipConfig, *, cache_dir: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Raises:
        ValueError: it is a Hugging Face tokenizer and the transformers package is missing.
    """
    return Tokenizer(config, cache_dir=cache_dir)


def _rebuild(config: ClipConfig, cache_dir: str | None) -> Tokenizer:
    return Tokenizer(config, cache_dir=cache_dir)


def _build(config: ClipConfig, *, cache_dir: str | None) -> _Encode:
    """OpenCLIP's choice: a named Hugging Face tokenizer, SigLIP's vocabularies by model name, else OpenAI's."""
    name = config.name.lower()
    if config.text_cfg.hf_tokenizer_name:
        return _build_hugging_face(config, cache_dir=cache_dir)
    if "siglip" in name and not name.startswith((LOCAL_DIR, HF_HUB)):
        return _build_siglip(config)
    length, options = config.text_cfg.context_length, dict(config.text_cfg.tokenizer_kwargs or {})
    if options.keys() <= {"clean"} and options.get("clean", "lower") in CLEAN_MODES:
        return ClipBpe(context_length=length, **options)
    from open_clip.tokenizer import SimpleTokenizer  # other vocabularies, and token reduction by random masks

    return cast(_Encode, SimpleTokenizer(context_length=length, **options))


def _build_hugging_face(config: ClipConfig, *, cache_dir: str | None) -> _Encode:
    from models.hf_text_tower import require_transformers

    text = config.text_cfg
    require_transformers(f"tokenizer '{text.hf_tokenizer_name}' of model '{config.name}'")
    from open_clip.tokenizer import HFTokenizer

    # A model in a local directory brings its tokenizer's files along.
    is_local = config.name.startswith(LOCAL_DIR)
    tokenizer = HFTokenizer(
        config.name.removeprefix(LOCAL_DIR) if is_local else text.hf_tokenizer_name,
        context_length=text.context_length,
        cache_dir=cache_dir,
        tokenizer_mode=text.tokenizer_mode,
        **dict(text.tokenizer_kwargs or {}),
    )
    return cast(_Encode, tokenizer)


def _build_siglip(config: ClipConfig) -> _Encode:
    from models.hf_text_tower import require_transformers

    require_transformers(f"the SigLIP tokenizer of model '{config.name}'")
    from open_clip.tokenizer import SigLipTokenizer

    name = config.name.lower()
    vocabulary = "gemma" if "siglip2" in name else "mc4" if "i18n" in name else "c4-en"
    return cast(_Encode, SigLipTokenizer(vocabulary, context_length=config.text_cfg.context_length))
