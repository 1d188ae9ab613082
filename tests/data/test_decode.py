from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tests.factories import jpeg_bytes
from training.data.decode import SampleDecoder, UnusableSample, decode_caption, decode_image
from training.data.tar_reader import RawSample


def _noisy(image: Image.Image) -> torch.Tensor:
    return torch.randint(0, 255, (3, 4, 4), dtype=torch.uint8)


def _decoder() -> SampleDecoder:
    return SampleDecoder(transform=_noisy, image_key="jpg;png", text_key="txt;caption", max_image_pixels=10_000)


def test_randomness_is_keyed_by_the_sample_and_leaves_the_global_state_alone() -> None:
    raw = RawSample("k", {"png": jpeg_bytes(), "caption": b"hi"})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (_decoder().decode(raw, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_every_pixel_format_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (9, 7)).save(buffer, "TIFF")
    image = decode_image(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (9, 7))


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_damaged_images_are_unusable(cut: int) -> None:
    with pytest.raises(UnusableSample, match="broken_image"):
        decode_image(jpeg_bytes(size=(400, 400))[:cut])


def test_huge_images_are_refused_from_their_header() -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(UnusableSample, match="image_too_large"):
        decode_image(buffer.getvalue(), max_pixels=25_000_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty_caption"), (b"\xff\xfe", "caption_not_utf8"), (b"a" * 70_000, "caption_too_long")],
)
def test_unusable_captions_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableSample, match=reason):
        decode_caption(data)
