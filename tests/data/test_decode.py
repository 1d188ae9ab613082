from __future__ import annotations

import io
import random
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from models.config import PreprocessConfig
from tests.data.images import encode, render
from tests.factories import jpeg_bytes
from training.data.decode import SampleDecoder, UnusableSample, decode_caption, decode_image
from training.data.tar_reader import RawSample
from training.data.transforms import build_train_transform


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
    [
        (b"", "empty_caption"),
        (b" \t\r\n\x00\x00", "empty_caption"),
        ("\ufeff\u202e\u200b \u3000".encode(), "empty_caption"),
        (b"\xff\xfe", "caption_not_utf8"),
        ("a \ud800 b".encode("utf-8", "surrogatepass"), "caption_not_utf8"),
        (b"\xc0\x80", "caption_not_utf8"),
        (b"a" * 70_000, "caption_too_long"),
    ],
)
def test_captions_of_no_use_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableSample, match=reason):
        decode_caption(data)


def test_huge_captions_are_refused_unread() -> None:
    data = b"\xff" * 50_000_000
    start = time.process_time()
    with pytest.raises(UnusableSample, match="caption_too_long"):
        decode_caption(data)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize("caption", ["a\x00cat", "\u202eright to left\u202c", "\ufeffa cat", "👩‍👩‍👧", "\U0010ffff"])
def test_odd_but_legal_captions_are_kept_as_they_are(caption: str) -> None:
    assert decode_caption(caption.encode()) == caption


@pytest.mark.parametrize("decode", ["fast", "reference"])
def test_both_decoders_are_keyed_and_leave_the_global_state_alone(decode: str) -> None:
    aug = {"scale": (0.4, 1.0), "color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.8, "re_prob": 0.5}
    transform = build_train_transform(PreprocessConfig(size=(32, 32)), aug, decode=decode)
    decoder = SampleDecoder(transform=transform, image_key="jpg", text_key="txt", max_image_pixels=10_000)
    raw = RawSample("k", {"jpg": encode(render(90, 70)), "txt": b"hi"})
    random.seed(3), torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate()
    images = [decoder.decode(raw, seed=seed).image for seed in (5, 6, 5)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_both_decoders_refuse_the_same_samples() -> None:
    members = [{"txt": b"hi"}, {"jpg": b"junk", "txt": b"hi"}, {"jpg": encode(render(200, 101)), "txt": b"hi"}]
    for decode in ("fast", "reference"):
        transform = build_train_transform(PreprocessConfig(size=(32, 32)), {}, decode=decode)
        decoder = SampleDecoder(transform=transform, image_key="jpg", text_key="txt", max_image_pixels=20_000)
        for content, reason in zip(members, ("no_image", "broken_image", "image_too_large"), strict=True):
            with pytest.raises(UnusableSample, match=reason):
                decoder.decode(RawSample("k", content), seed=0)


def test_a_decoder_survives_pickling_and_imports_no_image_library_but_pillow() -> None:
    program = (
        "import pickle, sys; from models.config import PreprocessConfig; import training.data.decode as d;"
        "from training.data.transforms import build_train_transform as build;"
        "aug = dict(use_timm=True, color_jitter=(.3, .3, .3, .1), gray_scale_prob=.2, re_prob=.1);"
        "t = build(PreprocessConfig(size=(8, 8)), aug);"
        "x = d.SampleDecoder(transform=t, image_key='jpg', text_key='txt', max_image_pixels=0);"
        "assert len(pickle.dumps(x)) < 5000; pickle.loads(pickle.dumps(x));"
        "heavy = {'torchvision', 'timm', 'open_clip', 'transformers', 'fsspec', 'pandas'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
