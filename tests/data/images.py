"""Renders photo-like images: a spectrum that falls with frequency, shapes with hard edges, fine texture."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw


def render(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An RGB image with the difficulties of a photo: colour, gradients, edges, texture near the finest scale."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** 1.1  # photos: about 1/f
    planes = []
    for _ in range(3):
        noise = amplitude * np.exp(2j * math.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(noise, s=(height, width))
        planes.append(128 + 45 * plane / plane.std())
    pixels = np.stack(planes, axis=-1).mean(-1, keepdims=True) * 0.6 + np.stack(planes, axis=-1) * 0.4
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.integers(0, width), rng.integers(0, height)
        size = rng.integers(width // 20 + 1, width // 5 + 2)
        draw.ellipse((x, y, x + size, y + size // 2), fill=tuple(int(v) for v in rng.integers(0, 256, 3)), width=0)
        draw.line((x, y, x + size, y + size), fill=(20, 20, 20), width=max(1, width // 300))
    return image


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """The file as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def psnr(first: object, second: object) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images; 100 where they are equal."""
    error = (np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)) ** 2
    return 100.0 if not error.any() else float(10 * np.log10(255**2 / error.mean()))
