from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.images import encode, psnr, render
from training.data.crop import CropBox, RandomCrop
from training.data.fast_transform import resize
from training.data.image_file import decode_image
from training.data.jpeg import decode_jpeg_crop, read_jpeg_size, reduction

TARGET = (224, 224)


def _psnr_of_crop(data: bytes, box: CropBox) -> float:
    """The fast crop and resize against Pillow's, for the same box."""
    size = read_jpeg_size(data)
    assert size is not None
    pixels = decode_jpeg_crop(data, size, box, target=TARGET)
    assert pixels is not None
    fast = resize(torch.from_numpy(pixels), TARGET, mode="bicubic").permute(1, 2, 0)
    top, left, height, width = box.aligned(reduction(box, target=TARGET))
    crop = decode_image(data).crop((left, top, left + width, top + height))
    return psnr(fast, crop.resize(TARGET[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("side", [100, 256, 512, 800])
def test_crops_at_full_size_are_within_single_levels_of_pillows(side: int, subsampling: int) -> None:
    data = encode(render(side * 5 // 4, side), quality=90, subsampling=subsampling)
    for seed in range(4):
        box = RandomCrop((0.3, 1.0), (3 / 4, 4 / 3)).draw(side, side * 5 // 4, random.Random(seed))
        assert reduction(box, target=TARGET) == 1 or side == 800
        if reduction(box, target=TARGET) == 1:
            assert _psnr_of_crop(data, box) > 69


@pytest.mark.parametrize(("side", "factor"), [(899, 2), (1025, 2), (1803, 4)])
@pytest.mark.parametrize("quality", [75, 95])
def test_reduced_crops_are_within_45_db_of_pillows(side: int, factor: int, quality: int) -> None:
    data = encode(render(side + 51, side), quality=quality)
    for box in (CropBox(0, 0, side, side + 51), CropBox(1, 33, side - 1, side - 2), CropBox(2, 3, side - 2, side)):
        assert reduction(box, target=TARGET) == factor
        assert _psnr_of_crop(data, box) > 45


@pytest.mark.parametrize("width", [150, 223, 224, 225, 260, 300])
@pytest.mark.parametrize("height", [200, 224, 226, 297, 376, 420])
def test_passes_are_made_in_pillows_order(height: int, width: int) -> None:
    image = render(width, height)
    fast = resize(torch.from_numpy(np.array(image)), TARGET, mode="bicubic").permute(1, 2, 0)
    assert psnr(fast, image.resize(TARGET[::-1], Image.Resampling.BICUBIC)) > 66  # the other order: 55


@pytest.mark.parametrize(("side", "factor"), [(224, 1), (895, 1), (896, 2), (1791, 2), (1792, 4), (3584, 8)])
def test_reduced_crops_keep_twice_the_target(side: int, factor: int) -> None:
    assert reduction(CropBox(0, 0, side, side), target=TARGET) == factor
    assert reduction(CropBox(0, 0, side, 400), target=TARGET) == 1


def test_progressive_grey_and_rgb_jpegs_are_decoded_as_by_pillow() -> None:
    image = render(90, 70)
    files = [encode(image, progressive=True), encode(image.convert("L")), encode(image, keep_rgb=True)]
    for data in files:
        size = read_jpeg_size(data)
        assert size == (70, 90)
        pixels = decode_jpeg_crop(data, size, CropBox(0, 0, 70, 90), target=TARGET)
        np.testing.assert_array_equal(pixels, np.asarray(decode_image(data)))


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a", encode(Image.new("CMYK", (8, 8)))])
def test_what_is_not_an_ordinary_jpeg_is_left_to_pillow(data: bytes) -> None:
    assert read_jpeg_size(data) is None


def test_a_jpeg_with_warnings_is_left_to_pillow() -> None:
    data = encode(render(90, 70))
    size = read_jpeg_size(data)
    assert size is not None
    assert decode_jpeg_crop(data[:-400], size, CropBox(0, 0, 70, 90), target=TARGET) is None
