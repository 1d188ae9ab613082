"""Webdataset shards of photos, made from the few that libraries bundle: as many pixels and bytes as web photos have.

    photos of scikit-image and scikit-learn -> crop, mirror, resize to the short side -> JPEG 85-95 + caption -> tars
    DIRECTORY/512px-2048/base/00000.tar, 00001.tar       DIRECTORY/512px-2048/00000.tar ... 00047.tar: links to them

The links make the data set long enough to fill shuffle buffers of 5,000 samples with files that the page cache holds,
and as many shards as a run of one rank reads at a time.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import string
import tarfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from benchmarks.batches import LENGTHS_FILE

BASE_SHARDS = 2
LINKED_SHARDS = 48
_BUNDLED = {
    "skimage": tuple(
        f"data/{name}"
        for name in (
            *("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png"),
            *("rocket.jpg", "grass.png", "gravel.png", "brick.png"),
        )
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
_VOCABULARY = 20_000


class Shards(NamedTuple):
    """What was written."""

    pattern: str
    """For ``--train-data``."""
    samples: int
    """In all linked shards together."""
    image_kb: float
    """Of a photo, on average."""


def find_photos(directory: Path | None) -> list[Path]:
    """The photos in a directory, or those that come with scikit-image and scikit-learn.

    Raises:
        ValueError: there are none.
    """
    if directory is not None:
        photos = sorted(path for path in directory.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        remedy = f"pass a folder with .jpg or .png files to --photos, not {str(directory)!r}"
    else:
        photos = [path for package, names in _BUNDLED.items() for path in _bundled(package, names)]
        remedy = "pip install scikit-image scikit-learn, or pass a folder of photos to --photos"
    if not photos:
        raise ValueError(f"No photos to make shards of: {remedy}.")
    return photos


def _bundled(package: str, names: Sequence[str]) -> Iterator[Path]:
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        paths = (Path(spec.origin).parent / name for name in names)
        yield from (path for path in paths if path.is_file())


def make_shards(photos: Sequence[Path], directory: Path, *, short_side: int, samples: int) -> Shards:
    """Writes the shards of one size, unless they are there already."""
    directory = directory / f"{short_side}px-{samples}"
    description = directory / "shards.json"
    if not description.exists():
        (directory / "base").mkdir(parents=True, exist_ok=True)
        pictures = [Image.open(path).convert("RGB") for path in photos]
        rng = random.Random(short_side)
        per_shard = -(-samples // BASE_SHARDS)
        image_bytes = 0
        for shard in range(BASE_SHARDS):
            path = directory / "base" / f"{shard:05d}.tar"
            image_bytes += _write_shard(path, pictures, rng, short_side=short_side, samples=per_shard)
        for link in range(LINKED_SHARDS):
            target = directory / f"{link:05d}.tar"
            target.unlink(missing_ok=True)
            target.symlink_to(Path("base") / f"{link % BASE_SHARDS:05d}.tar")
        image_kb = image_bytes / (per_shard * BASE_SHARDS) / 1000
        description.write_text(json.dumps({"samples": per_shard * LINKED_SHARDS, "image_kb": round(image_kb, 1)}))
    pattern = os.path.join(directory, f"{{00000..{LINKED_SHARDS - 1:05d}}}.tar")
    return Shards(pattern, **json.loads(description.read_text()))


def _write_shard(
    path: Path, pictures: Sequence[Image.Image], rng: random.Random, *, short_side: int, samples: int
) -> int:
    """Bytes of the photos written."""
    total = 0
    with tarfile.open(path, "w") as tar:
        for index in range(samples):
            image = _encode(_vary(rng.choice(pictures), rng, short_side=short_side), rng)
            total += len(image)
            members = {"jpg": image, "txt": _caption(rng).encode(), "json": b'{"width": 0, "status": "success"}'}
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{index:08d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return total


def _vary(picture: Image.Image, rng: random.Random, *, short_side: int) -> Image.Image:
    """A random part of a photo, 2:3 to 3:2, at the wanted short side."""
    aspect = math.exp(rng.uniform(math.log(2 / 3), math.log(3 / 2)))
    scale = rng.uniform(0.7, 1.0) * min(picture.width / max(aspect, 1), picture.height * min(aspect, 1))
    width, height = int(scale * max(aspect, 1)), int(scale / min(aspect, 1))
    width, height = min(width, picture.width), min(height, picture.height)
    left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    factor = short_side / min(width, height)
    size = max(short_side, round(width * factor)), max(short_side, round(height * factor))
    part = picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def _encode(image: Image.Image, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(85, 95))
    return buffer.getvalue()


def _caption(rng: random.Random) -> str:
    """As many words as recorded web captions have tokens; common words come often, rare ones hardly ever."""
    histogram = json.loads(LENGTHS_FILE.read_text())["histogram"]
    tokens = int(rng.choices(list(histogram), weights=list(histogram.values()))[0])
    return " ".join(_word(int(_VOCABULARY ** rng.random())) for _ in range(max(3, tokens * 2 // 3)))


def _word(rank: int) -> str:
    letters = random.Random(rank)
    return "".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 10)))
