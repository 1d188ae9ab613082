from __future__ import annotations

import random
import resource
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.config import PreprocessConfig
from tests.data.images import encode, psnr, render
from training.data.fast_transform import FastTransform
from training.data.image_file import UnusableSample, decode_image
from training.data.transforms import build_train_transform

SIZE = PreprocessConfig(size=(64, 48))
COLORS = {"color_jitter": (0.32, 0.32, 0.32, 0.08), "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}


def _transform(preprocess: PreprocessConfig = SIZE, **aug: Any) -> FastTransform:
    transform = build_train_transform(preprocess, aug)
    assert isinstance(transform, FastTransform)
    return transform


@pytest.mark.parametrize("aug", [{}, COLORS, {**COLORS, "use_timm": True, "re_prob": 0.5}])
def test_pixels_are_keyed_by_file_and_seed_alone(aug: dict[str, Any]) -> None:
    data, transform = encode(render(160, 120)), _transform(**aug)
    first = [transform(data, seed=seed) for seed in range(8)]
    random.seed(7), torch.manual_seed(7)
    again = [_transform(**aug)(data, seed=seed) for seed in reversed(range(8))][::-1]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert len({image.numpy().tobytes() for image in first}) == 8
    assert first[0].shape == (3, 64, 48)
    assert first[0].dtype == torch.uint8
    assert first[0].is_contiguous()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_png_jpeg_and_pillows_resize_agree_on_the_whole_image(interpolation: str) -> None:
    image = render(120, 90)
    preprocess = PreprocessConfig(size=(64, 64), interpolation=interpolation)
    transform = _transform(preprocess, scale=(1.0, 1.0), ratio=(120 / 90, 120 / 90), use_timm=True)
    resample = Image.Resampling[interpolation.upper()]
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True), encode(image, quality=95)):
        expected = np.asarray(decode_image(data).resize((64, 64), resample))
        assert psnr(transform(data, seed=1).permute(1, 2, 0), expected) > 68.5


def test_random_interpolation_takes_both_kernels() -> None:
    aug = {"scale": (1.0, 1.0), "ratio": (160 / 120, 160 / 120), "use_timm": True}
    transform = _transform(PreprocessConfig(size=(64, 64), interpolation="random"), **aug)
    data = encode(render(160, 120))
    assert len({transform(data, seed=seed).numpy().tobytes() for seed in range(20)}) == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16"])
def test_every_pixel_format_has_pillows_colours(mode: str) -> None:
    grey = render(64, 48).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "TIFF" if mode == "PA" else "PNG")
    transform = _transform(PreprocessConfig(size=(48, 64)), scale=(1.0, 1.0), ratio=(64 / 48, 64 / 48))
    np.testing.assert_array_equal(transform(data, seed=0).permute(1, 2, 0), np.asarray(decode_image(data)))


def test_the_first_frame_of_an_animation_is_taken_and_orientation_ignored() -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    whole = _transform(PreprocessConfig(size=(6, 8)), scale=(1.0, 1.0), ratio=(8 / 6, 8 / 6))
    for format in ("GIF", "WEBP"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        red, _, blue = whole(data, seed=0).float().mean(dim=(1, 2))
        assert red > 240 > 15 > blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = render(64, 48)
    np.testing.assert_array_equal(whole(encode(image, exif=exif), seed=0), whole(encode(image), seed=0))


def _verdict(decode: Any) -> str:
    try:
        decode()
    except UnusableSample as fault:
        return fault.reason
    return "accepted"


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_are_judged_as_by_pillow(progressive: bool) -> None:
    data, transform = encode(render(100, 80), progressive=progressive), _transform()
    rng = random.Random(0)
    damaged = [data[: -1 - int(len(data) * share)] for share in (0, 0.1, 0.5, 0.9, 0.99)]
    damaged += [data + b"trailing", data + data, data[:-2], b"<html>404</html>", data[2:], b"\xff\xd8\xff" + data]
    for _ in range(150):
        position = rng.randrange(len(data))
        damaged.append(data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :])
    verdicts = [_verdict(lambda d=item: transform(d, seed=1)) for item in damaged]
    assert verdicts == [_verdict(lambda d=item: decode_image(d)) for item in damaged]
    assert verdicts[1] == "broken_image"
    assert verdicts[5] == "accepted"


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000), (65_000, 7), (1, 1), (2, 3)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_extreme_shapes_are_decoded_in_bounded_time(size: tuple[int, int], format: str) -> None:
    data = encode(Image.new("RGB", size, (10, 200, 30)), format)
    start = time.process_time()
    image = _transform(scale=(0.08, 1.0))(data, seed=3)
    assert time.process_time() - start < 1
    assert (image.float().mean(dim=(1, 2)) - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 4


def test_bombs_are_refused_from_their_header_without_memory() -> None:
    data = encode(Image.new("L", (13_000, 13_000)), "PNG")
    huge = encode(Image.new("L", (64, 64)))
    frame = huge.index(b"\xff\xc0")  # height and width follow length and precision
    huge = huge[: frame + 5] + (60_000).to_bytes(2, "big") * 2 + huge[frame + 9 :]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for bomb in (data, huge):
        with pytest.raises(UnusableSample, match="image_too_large"):
            _transform()(bomb, seed=0, max_pixels=100_000_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert time.process_time() - start < 1


@pytest.mark.parametrize("decode", [_transform(), lambda data, seed: decode_image(data)])
def test_jpegs_of_very_many_scans_are_refused_at_once(decode: Any) -> None:
    data = encode(Image.new("L", (3000, 3000), 90), progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data, seed=0) is not None
    start = time.process_time()
    with pytest.raises(UnusableSample, match="broken_image"):
        decode(data[:-2] + last_scan * 2000 + data[-2:], seed=0)  # the last scan again and again: 40 s of decoding
    assert time.process_time() - start < 0.5


def test_programs_disguised_as_images_are_never_run() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(UnusableSample, match="broken_image"):
        _transform()(eps, seed=0)


@pytest.mark.parametrize("use_timm", [False, True])
def test_jitter_and_grey_scale_happen_with_their_probabilities(use_timm: bool) -> None:
    data = encode(render(48, 64), "PNG")
    common = {"scale": (1.0, 1.0), "ratio": (48 / 64, 48 / 64), "use_timm": use_timm}
    plain = _transform(**common)(data, seed=0)
    jitter = _transform(**common, color_jitter=(0.3, 0.3, 0.3, 0.1), color_jitter_prob=0.6)
    outputs = [jitter(data, seed=seed) for seed in range(600)]
    assert np.mean([not torch.equal(out, plain) for out in outputs]) == pytest.approx(0.6, abs=0.07)
    grey = _transform(**common, gray_scale_prob=0.3)
    outputs = [grey(data, seed=seed) for seed in range(600)]
    assert np.mean([torch.equal(out[0], out[2]) for out in outputs]) == pytest.approx(0.3, abs=0.06)


def test_open_clips_effective_meaning_holds_on_the_fast_path(caplog: pytest.LogCaptureFixture) -> None:
    transform = _transform(use_timm=True, gray_scale_prob=1.0, re_prob=0.2, openclip_keys=True)
    assert transform.augmentation.grey_probability == 0
    assert transform.augmentation.erasing is not None
    assert "gray_scale_prob has no effect" in caplog.text
    dropped = _transform(color_jitter=0.4, ratio=(1.0, 1.0), re_prob=0.2, openclip_keys=True).augmentation
    assert (dropped.jitter, dropped.erasing, dropped.crop.ratio) == (None, None, (3 / 4, 4 / 3))
