"""What ``--decode gpu`` gives on a device: images per second, and its pixels against Pillow's of the same crops.

    python -m benchmarks.device_decode --device cuda

    photos of libraries -> JPEGs of 256, 512, 1024 px -> worker's part (timed) -> device: decode, crop, resize (timed)

Decoders enlarge chroma smoothly (libjpeg) or plainly. What the latter costs is shown on any device: libjpeg does both.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.photo_shards import find_photos
from benchmarks.provenance import describe_run
from models.config import PreprocessConfig
from training.data.device_decode import decode_rows
from training.data.device_transform import DeviceTransform
from training.data.encoded_image import DecodedOnHost, EncodedImage
from training.data.fast_transform import resize
from training.data.image_file import decode_image
from training.data.ring import RingLayout
from training.data.transforms import build_train_transform

_QUALITY = 90


class Measured(NamedTuple):
    """Of photos of one short side."""

    short_side: int
    image_kb: float
    images_per_s: list[float]
    """On the device: median, least, greatest of the rounds."""
    header_us: float
    """Of a worker's time, per image."""
    device_db: list[float]
    """Against Pillow: least, median of the photos."""
    plain_chroma_db: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a line per size, writes JSON if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_decode", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="short sides of the photos")
    parser.add_argument(
        "--photos", type=Path, help="folder of photos; without it, those of scikit-image and scikit-learn"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    photos = [Image.open(path).convert("RGB") for path in find_photos(arguments.photos)]
    results = []
    for size in arguments.sizes:
        result = measure(
            photos, short_side=size, batch_size=arguments.batch_size, rounds=arguments.rounds, device=device
        )
        results.append(result._asdict())
        sys.stdout.write(json.dumps(results[-1]) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps({"run": describe_run(device), "results": results}, indent=1) + "\n")
    return 0


def measure(
    photos: Sequence[Image.Image], *, short_side: int, batch_size: int, rounds: int, device: torch.device
) -> Measured:
    """One batch, decoded again and again. Photos that are too large for a row are encoded at lower quality."""
    transform = build_train_transform(PreprocessConfig(size=(224, 224)), {}, decode="gpu")
    assert isinstance(transform, DeviceTransform)
    files = [_file(photo, short_side, transform) for photo in photos]
    start = time.perf_counter()
    encoded = [transform.encode(files[row % len(files)], seed=row) for row in range(batch_size)]
    header_us = (time.perf_counter() - start) / batch_size * 1e6
    images, times = _decode(encoded, transform, rounds=rounds, device=device)
    shown = images[: len(files)].cpu()
    expected = [_with_pillow(image) for image in encoded[: len(files)]]
    plain = [_with_plain_chroma(image) for image in encoded[: len(files)]]
    rates = [batch_size / seconds for seconds in times]
    return Measured(
        short_side,
        round(statistics.mean(len(image.data) for image in encoded) / 1000, 1),
        [round(rate) for rate in (statistics.median(rates), min(rates), max(rates))],
        round(header_us, 1),
        _least_and_median([_psnr(*pair) for pair in zip(shown, expected, strict=True)]),
        _least_and_median([_psnr(*pair) for pair in zip(plain, expected, strict=True)]),
    )


def _file(photo: Image.Image, short_side: int, transform: DeviceTransform) -> bytes:
    factor = short_side / min(photo.size)
    scaled = photo.resize((round(photo.width * factor), round(photo.height * factor)), Image.Resampling.BICUBIC)
    for quality in range(_QUALITY, 10, -10):
        buffer = io.BytesIO()
        scaled.save(buffer, "JPEG", quality=quality)
        try:
            transform.encode(buffer.getvalue(), seed=0)
        except DecodedOnHost:
            continue
        return buffer.getvalue()
    raise ValueError(f"A photo of {scaled.size} pixels fits into {transform.room} bytes at no quality: leave it out.")


def _decode(
    encoded: Sequence[EncodedImage], transform: DeviceTransform, *, rounds: int, device: torch.device
) -> tuple[Tensor, list[float]]:
    """(images, seconds of each round); the first round is not timed."""
    layout = RingLayout(1, len(encoded), transform.size, 1, transform.room)
    buffers = layout.buffers([torch.zeros(shape, dtype=dtype) for dtype, shape in layout.parts])
    assert buffers.encoded is not None
    for row, image in enumerate(encoded):
        buffers.put_image(row, image)
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        decoded = decode_rows(buffers.images, buffers.encoded, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        assert not decoded.broken
        assert not decoded.refused
    return decoded.images, times[1:]


def _with_pillow(image: EncodedImage) -> Tensor:
    top, left, height, width = image.box
    part = decode_image(image.data).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(part.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _with_plain_chroma(image: EncodedImage) -> Tensor:
    top, left, height, width = image.box
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(image.data, "RGB", fastupsample=True))
    return resize(pixels[top : top + height, left : left + width], (224, 224), mode="bicubic")


def _psnr(first: Tensor, second: Tensor) -> float:
    error = (first.double() - second.double()).square().mean().item()
    return 100.0 if error == 0 else 10 * float(np.log10(255**2 / error))


def _least_and_median(values: Sequence[float]) -> list[float]:
    return [round(min(values), 1), round(statistics.median(values), 1)]


if __name__ == "__main__":
    sys.exit(main())
