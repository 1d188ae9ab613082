"""Builds tiny real things: shards, CSV files, tokenizers."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image


def jpeg_bytes(color: tuple[int, int, int] = (200, 30, 60), *, size: tuple[int, int] = (40, 32)) -> bytes:
    """A small JPEG of one colour; ``size`` is (width, height)."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tiny_model(directory: Path) -> Path:
    """A configuration of a model, for --model: both towers of two narrow blocks, images of 32 px."""
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    path = directory / "tiny-vit.json"
    path.write_text(json.dumps(model))
    return path


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """A tar with the given members: [(key, {extension: data})]."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(directory: Path, *, shards: int, samples: int) -> str:
    """Shards with unique keys and captions, and sizes.json; returns the brace pattern."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        content = [
            (
                f"{shard:03d}-{index:04d}",
                {
                    "jpg": jpeg_bytes((17 * shard % 256, 5 * index % 256, 90)),
                    "txt": f"a photo of number {shard} {index}".encode(),
                },
            )
            for index in range(samples)
        ]
        write_tar(directory / f"{shard:03d}.tar", content)
    (directory / "sizes.json").write_text(json.dumps({f"{shard:03d}.tar": samples for shard in range(shards)}))
    return f"{directory}/{{000..{shards - 1:03d}}}.tar"


def write_csv(directory: Path, *, rows: int, separator: str = "\t", image_column: str = "filepath") -> Path:
    """A CSV of images beside it, with relative paths."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [separator.join((image_column, "title"))]
    for row in range(rows):
        (directory / f"{row}.jpg").write_bytes(jpeg_bytes((row % 256, 9, 9)))
        lines.append(separator.join((f"{row}.jpg", f"caption {row}")))
    path = directory / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def character_tokens(texts: Sequence[str]) -> torch.Tensor:
    """A tokenizer for tests: the code points of the text, cut and padded to 32."""
    rows = [[ord(character) for character in text[:32]] for text in texts]
    return torch.tensor([row + [0] * (32 - len(row)) for row in rows], dtype=torch.int64)


def token_texts(tokens: torch.Tensor) -> list[str]:
    """The inverse of ``character_tokens``."""
    return ["".join(chr(code) for code in row if code) for row in tokens.tolist()]
