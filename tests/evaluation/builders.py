"""Builds small evaluation sets on disk, and a tiny CLIP model of OpenCLIP's as the reference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
import webdataset
from PIL import Image, ImageDraw
from torch import nn

from models.config import PreprocessConfig
from training.data.transforms import build_eval_transform
from training.evaluation.batches import Loading

IMAGE_SIZE = 32
CONTEXT_LENGTH = 20
PREPROCESS = PreprocessConfig(size=(IMAGE_SIZE, IMAGE_SIZE))
CLASS_NAMES = ("red fox", "blue car", "green tree", "night sky", "snow", "desert sand", "tennis ball")
TEMPLATES = ("a photo of a {c}.", "{c}", "a blurry drawing of the {c}, on paper")


def draw_image(number: int) -> Image.Image:
    """A picture that differs from the others in colours and shapes, not square."""
    generator = torch.Generator().manual_seed(number)
    r, g, b, x, y, q = torch.randint(0, 255, (6,), generator=generator).tolist()
    image = Image.new("RGB", (48, 40), (r, g, b))
    draw = ImageDraw.Draw(image)
    draw.ellipse((x % 30, y % 20, x % 30 + 15, y % 20 + 12), fill=(b, q, r))
    draw.rectangle((q % 25, x % 15, q % 25 + 9, x % 15 + 20), fill=(g, r, q))
    return image


def encoded(number: int, kind: str = "PNG") -> bytes:
    """``draw_image`` as a file's bytes."""
    buffer = io.BytesIO()
    draw_image(number).save(buffer, kind)
    return buffer.getvalue()


def captions_of(number: int) -> list[str]:
    """One to three captions, so that captions and images do not align."""
    return [f"picture {number}, seen {word} by {number * 7 % 11} people" for word in ("once", "twice", "often")][
        : number % 3 + 1
    ]


def label_of(number: int) -> int:
    return number * 5 % len(CLASS_NAMES)


def write_classification_set(directory: Path, *, samples: int = 23, shards: int = 3) -> Path:
    """CLIP_benchmark's layout, the tars written by webdataset."""
    _write_split(
        directory, [{"png": encoded(n), "cls": str(label_of(n)).encode()} for n in range(samples)], shards=shards
    )
    (directory / "classnames.txt").write_text("\n".join(CLASS_NAMES) + "\n")
    (directory / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return directory


def write_retrieval_set(directory: Path, *, samples: int = 17, shards: int = 2) -> Path:
    """Images with several captions each, one per line."""
    content = [{"webp": encoded(n, "WEBP"), "txt": "\n".join(captions_of(n)).encode()} for n in range(samples)]
    _write_split(directory, content, shards=shards)
    (directory / "dataset_type.txt").write_text("retrieval\n")
    return directory


def write_pairs(directory: Path, *, samples: int = 22, shards: int = 2) -> str:
    """Validation shards with one caption per image; returns the brace pattern."""
    content = [{"jpg": encoded(n, "JPEG"), "txt": captions_of(n)[-1].encode()} for n in range(samples)]
    _write_split(directory, content, shards=shards)
    return f"{directory}/test/{{0..{shards - 1}}}.tar"


def write_class_folders(directory: Path, names: Sequence[str], *, per_class: int = 1, suffix: str = "png") -> Path:
    """Folders of images, named as given."""
    data = encoded(1)
    for name in names:
        folder = directory / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            (folder / f"{name}_{number}.{suffix}").write_bytes(data)
    return directory


def _write_split(directory: Path, content: Sequence[dict[str, bytes]], *, shards: int) -> None:
    test = directory / "test"
    test.mkdir(parents=True)
    per_shard = -(-len(content) // shards)
    with webdataset.ShardWriter(f"{test}/%d.tar", maxcount=per_shard, verbose=0) as writer:
        for number, members in enumerate(content):
            writer.write({"__key__": f"s{number:05d}", **members})
    (test / "nshards.txt").write_text(f"{shards}\n")


def tiny_clip(*, seed: int = 0) -> nn.Module:
    """OpenCLIP's own CLIP, small, in eval mode."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": IMAGE_SIZE, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
        text_cfg={"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        output_dict=True,
    )
    # Untrained features lie close together; without this the reference metrics would hang on the last bits.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model.eval()


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)


def loading(*, rank: int = 0, world_size: int = 1, workers: int = 0, batch_size: int = 5) -> Loading:
    """How tests read sets."""
    return Loading(
        transform=build_eval_transform(PREPROCESS),
        tokenizer=tokenizer(),
        batch_size=batch_size,
        workers=workers,
        rank=rank,
        world_size=world_size,
    )
