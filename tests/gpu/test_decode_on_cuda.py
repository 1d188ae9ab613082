"""``--decode gpu`` on a GPU: the host's pixels, whatever is among the files, while the step computes."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import PreprocessConfig
from tests.data.images import encode, psnr, render
from tests.data.test_device_decode import CPU, SIZE, decode_on, transform_of, undecodable_jpeg
from tests.factories import character_tokens, token_texts, write_tar
from training.config import DataConfig, ImageConfig
from training.data import device_decode
from training.data.baseline_jpeg import read_baseline
from training.data.batch import to_device
from training.data.build import build_train_loader
from training.data.crop import CropBox
from training.data.device_decode import check_decoder
from training.data.encoded_image import EncodedImage
from training.data.jpeg import JpegSize
from training.data.prefetch import load_to_device, pin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),
]


@pytest.mark.parametrize(("subsampling", "least_db"), [(0, 45), (1, 33), (2, 33)])
def test_pixels_are_those_of_the_host(device: torch.device, subsampling: int, least_db: float) -> None:
    """Without chroma to enlarge but for rounding; with it, decoders differ by as much as plain and smooth enlarging."""
    check_decoder(device)
    files = [encode(render(120 + i, 90, seed=i), quality=90, subsampling=subsampling) for i in range(20)]
    encoded = [transform_of(scale=(0.4, 1.0)).encode(data, seed=seed) for seed, data in enumerate(files)]
    ours, expected = (decode_on(place, encoded, SIZE) for place in (device, CPU))
    assert (ours.refused, ours.broken) == (0, [])
    assert min(psnr(a.cpu(), b) for a, b in zip(ours.images, expected.images, strict=True)) > least_db


def test_the_cropped_and_resized_part_is_the_right_one_for_large_reductions_too(device: torch.device) -> None:
    data = encode(render(1500, 1400), quality=40)
    jpeg = read_baseline(data)
    boxes = [CropBox(0, 0, 1400, 1500), CropBox(700, 3, 600, 1480), CropBox(1390, 1490, 10, 10)]
    encoded = [EncodedImage(jpeg.data, jpeg.size, box, "bicubic") for box in boxes]
    ours, expected = (decode_on(place, encoded, SIZE).images for place in (device, CPU))
    assert min(psnr(a.cpu(), b) for a, b in zip(ours, expected, strict=True)) > 33


def test_a_file_that_cannot_be_decoded_leaves_the_others_as_they_are(device: torch.device) -> None:
    files = [encode(render(100, 80, seed=i)) for i in range(6)]
    whole = [transform_of().encode(data, seed=0) for data in files]
    expected = decode_on(device, whole, SIZE).images
    broken = transform_of().encode(undecodable_jpeg(), seed=0)
    mixed = decode_on(device, [*whole[:2], broken, *whole[3:5], torch.full((3, *SIZE), 9, dtype=torch.uint8)], SIZE)
    assert mixed.broken == [2]
    assert torch.equal(mixed.images[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
    assert mixed.images[5].eq(9).all()


def test_files_that_only_the_host_decodes_are_decoded_there_in_chunks_of_any_size(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [transform_of().encode(encode(render(100, 80, seed=i)), seed=0) for i in range(6)]
    png = EncodedImage(encode(render(60, 50), "PNG"), JpegSize(50, 60), CropBox(0, 0, 50, 60), "bicubic")
    expected = decode_on(device, whole, SIZE).images
    for pixels in (1 << 25, 2 * 100 * 80, 1):  # all at once, in pairs, one by one
        monkeypatch.setattr(device_decode, "_CHUNK_PIXELS", pixels)
        mixed = decode_on(device, [*whole[:3], png, *whole[3:]], SIZE)
        assert (mixed.refused, mixed.broken) == (1, [])
        assert torch.equal(mixed.images[[0, 1, 2, 4, 5, 6]], expected)
        assert torch.equal(mixed.images[3].cpu(), decode_on(CPU, [png], SIZE).images[0])


def test_a_device_without_memory_says_so_and_refuses_nothing(device: torch.device) -> None:
    file = torch.frombuffer(bytearray(encode(render(1500, 1400), quality=40)), dtype=torch.uint8)
    check_decoder(device)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + (8 << 20)) / total, device)
    try:
        with pytest.raises(RuntimeError, match="has no memory left to decode 8 JPEGs .*lower --batch-size"):
            device_decode._decode_files([file] * 8, device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert all(image is not None for image in device_decode._decode_files([file] * 8, device))


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_batches_of_mixed_files_are_those_of_the_host(
    device: torch.device, tmp_path: Path, workers: int
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"format": "PNG"}, {"quality": 50}]
    files = [encode(render(200 + i, 170, seed=i), **kinds[i % 4]) for i in range(24)]
    shard = write_tar(tmp_path / "0.tar", [(f"{i}", {"jpg": f, "txt": b"%d" % i}) for i, f in enumerate(files)])
    config = DataConfig(train_data=str(shard), train_num_samples=24, batch_size=6, workers=workers, decode="gpu")
    convert = partial(to_device, mean=(0.0,) * 3, std=(1 / 255,) * 3, dtype=torch.float32)
    found = {}
    for place in (CPU, device):
        loader = build_train_loader(
            config,
            ImageConfig(),
            preprocess=PreprocessConfig(size=SIZE),
            tokenizer=character_tokens,  # type: ignore[arg-type]
            rank=0,
            world_size=1,
            accum_freq=1,
            seed=1,
            pin=pin if place == device and workers else None,
        )
        batches = []
        for batch in islice(load_to_device(iter(loader), to_device=partial(convert, device=place), device=place), 6):
            if place == device:
                torch.cuda._sleep(10_000_000)  # the step is slow: the decoder runs ahead
            batches.append((token_texts(batch.texts.cpu()), batch.images.cpu()))
        found[place] = batches
    for (texts, images), (expected_texts, expected) in zip(found[device], found[CPU], strict=True):
        assert texts == expected_texts
        assert min(psnr(a, b) for a, b in zip(images, expected, strict=True)) > 33
