"""``--decode gpu``, with the CPU as the device: which part of an image is shown, in which pixels, whatever the file."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.device_decode import main as benchmark
from models.config import PreprocessConfig
from tests.data.images import encode, psnr, render
from tests.factories import character_tokens, token_texts, write_tar
from training.config import DataConfig, ImageConfig
from training.data import device_decode, loader, prefetch
from training.data.accounting import data_metrics, from_vector, skipped, to_vector
from training.data.batch import DeviceBatch, to_device
from training.data.build import build_train_loader
from training.data.crop import CropBox
from training.data.device_decode import DecodedRows, check_decoder, decode_rows
from training.data.encoded_image import DecodedOnHost, EncodedImage, file_room
from training.data.image_file import decode_image
from training.data.jpeg import JpegSize
from training.data.loader import TrainLoader
from training.data.position import StreamPosition
from training.data.prefetch import load_to_device
from training.data.ring import RingLayout
from training.data.transforms import build_train_transform

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
CPU = torch.device("cpu")
SIZE = (64, 48)
COLORS = {"color_jitter": (0.3, 0.3, 0.3, 0.1), "color_jitter_prob": 0.5, "gray_scale_prob": 0.2}


def undecodable_jpeg() -> bytes:
    """A JPEG with a whole header whose first Huffman table holds a symbol that no decoder takes."""
    data = bytearray(encode(render(60, 60)))
    data[data.index(b"\xff\xc4") + 21] = 0xFF
    return bytes(data)


def transform_of(decode: str = "gpu", *, interpolation: str = "bicubic", **aug: Any) -> Any:
    return build_train_transform(PreprocessConfig(size=SIZE, interpolation=interpolation), aug, decode=decode)


def _host_reason(transform: Any, data: bytes, *, seed: int) -> str:
    try:
        transform.encode(data, seed=seed)
    except DecodedOnHost as why:
        return why.reason
    return "none"


def decode_on(device: torch.device, images: Sequence[EncodedImage | Tensor], size: tuple[int, int]) -> DecodedRows:
    layout = RingLayout(1, len(images), size, 4, file_room(size))
    buffers = layout.buffers([torch.full(shape, 7, dtype=dtype) for dtype, shape in layout.parts])
    for row, image in enumerate(images):
        buffers.put_image(row, image)
    assert buffers.encoded is not None
    return decode_rows(buffers.images, buffers.encoded, device=device)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("width", [80, 300, 600])
def test_pixels_agree_with_pillows_of_the_same_box(width: int, subsampling: int) -> None:
    data = encode(render(width, 3 * width // 4), quality=90, subsampling=subsampling)
    encoded = [transform_of(scale=(0.4, 1.0)).encode(data, seed=seed) for seed in range(3)]
    images = decode_on(CPU, encoded, SIZE).images
    for image, (_, _, (top, left, height, width), _) in zip(images, encoded, strict=True):
        part = decode_image(data).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize(SIZE[::-1], Image.Resampling.BICUBIC))
        assert psnr(image.permute(1, 2, 0), expected) > 52


@pytest.mark.parametrize("aug", [{}, {"scale": (0.1, 1.0), "ratio": (0.5, 2.0), "use_timm": True}])
def test_every_sample_shows_the_part_of_its_image_that_the_fast_transform_shows(aug: dict[str, Any]) -> None:
    data = encode(render(120, 90))
    gpu, fast = (transform_of(decode, interpolation="random", **aug) for decode in ("gpu", "fast"))
    images = decode_on(CPU, [gpu.encode(data, seed=seed) for seed in range(8)], SIZE).images
    assert all(psnr(image, fast(data, seed=seed)) > 50 for seed, image in enumerate(images))
    assert psnr(images[0], fast(data, seed=1)) < 40


def test_samples_that_are_recoloured_or_erased_are_the_hosts_and_no_others() -> None:
    data = encode(render(120, 90))
    transform, fast = (transform_of(decode, re_prob=0.2, **COLORS) for decode in ("gpu", "fast"))
    plain = transform_of("fast")
    recoloured = [seed for seed in range(60) if _host_reason(transform, data, seed=seed) == "recoloured"]
    changed = [seed for seed in range(60) if not torch.equal(fast(data, seed=seed), plain(data, seed=seed))]
    assert recoloured == changed
    assert 20 < len(changed) < 60


@pytest.mark.parametrize("size", [(5000, 4000), (2200, 2200), (900, 900)])
def test_files_pixels_and_reductions_beyond_the_devices_room_are_the_hosts(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90) if size == (900, 900) else Image.new("L", size)
    data = encode(image.convert("RGB"), quality=95)
    assert _host_reason(transform_of(), data, seed=0) == "too_large"


def test_a_row_has_room_for_its_pixels_and_for_ordinary_files() -> None:
    assert file_room((224, 224)) == 256 * 1024
    assert file_room((512, 512)) == 3 * 512 * 512
    assert file_room((448, 301)) % 4096 == 0


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [transform_of().encode(encode(render(60 + seed, 50)), seed=seed) for seed in range(5)]
    whole = decode_on(CPU, encoded, SIZE).images
    monkeypatch.setattr(device_decode, "_CHUNK_PIXELS", 7000)
    assert torch.equal(decode_on(CPU, encoded, SIZE).images, whole)


def _png(seed: int) -> EncodedImage:
    return EncodedImage(encode(render(60, 50, seed=seed), "PNG"), JpegSize(50, 60), CropBox(0, 0, 50, 60), "bicubic")


def test_a_file_that_the_device_refuses_is_decoded_here_and_the_others_where_they_should_be() -> None:
    encoded = [transform_of().encode(encode(render(80, 60)), seed=seed) for seed in range(4)]
    whole = decode_on(CPU, encoded, SIZE).images
    mixed = decode_on(CPU, [encoded[0], encoded[1], _png(3), encoded[3]], SIZE)
    assert (mixed.refused, mixed.broken) == (1, [])
    assert torch.equal(mixed.images[[0, 1, 3]], whole[[0, 1, 3]])
    expected = np.asarray(render(60, 50, seed=3).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    assert psnr(mixed.images[2].permute(1, 2, 0), expected) > 65


def test_a_device_that_refuses_everything_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="cpu decodes none of 8 JPEGs that the host can: pass --decode fast"):
        decode_on(CPU, [_png(seed) for seed in range(8)], SIZE)


def _failing(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[int]:
    """The decoder fails with these texts, one after another, and then works; returns how many files it was given."""
    decode, left, given = device_decode._decode_jpegs, list(texts), list[int]()

    def fail(files: list[Tensor], device: torch.device) -> list[Tensor]:
        given.append(len(files))
        if left:
            raise RuntimeError(left.pop(0))
        return decode(files, device)

    monkeypatch.setattr(device_decode, "_decode_jpegs", fail)
    return given


OUT_OF_MEMORY = "Error while decoding JPEG images: CUDA out of memory. Tried to allocate 96.00 MiB."
NO_BUFFER = "Error while decoding JPEG images: Failed to initialize batch decoding: 5\nException raised from"


@pytest.mark.parametrize("text", [OUT_OF_MEMORY, NO_BUFFER])
def test_a_device_without_memory_is_asked_again_and_then_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    encoded = [transform_of().encode(encode(render(80, 60)), seed=seed) for seed in range(4)]
    whole = decode_on(CPU, encoded, SIZE).images
    given = _failing(monkeypatch, text)
    again = decode_on(CPU, encoded, SIZE)
    assert given == [4, 4]
    assert torch.equal(again.images, whole)
    assert again.refused == 0
    _failing(monkeypatch, text, text)
    with pytest.raises(RuntimeError, match="cpu has no memory left to decode 4 JPEGs .*lower --batch-size"):
        decode_on(CPU, encoded, SIZE)


def test_after_a_refusal_the_decoder_is_called_for_what_it_may_still_do_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device_decode._tell_refusal.cache_clear()
    encoded = [transform_of().encode(encode(render(80, 60)), seed=seed) for seed in range(2)]
    given = _failing(monkeypatch)
    mixed = decode_on(CPU, [_png(0), *encoded, _png(1)], SIZE)
    assert mixed.refused == 2
    assert given == [4, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1]  # after each failure one, of the known file
    (line,) = [record.message for record in caplog.records if "refuses" in record.message]
    assert "train/data/decoded_on_host/refused counts them" in line


def test_a_decoder_that_is_not_there_or_decodes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="JPEGs cannot be decoded on cuda:99 .*torchvision built with nvJPEG"):
        check_decoder(torch.device("cuda", 99))
    check_decoder.cache_clear()
    with monkeypatch.context() as patched:
        _failing(patched, OUT_OF_MEMORY)
        with pytest.raises(ValueError, match="cannot be decoded on cpu .*out of memory.*other processes may hold"):
            check_decoder(CPU)
    decode = device_decode._decode_jpegs
    monkeypatch.setattr(device_decode, "_decode_jpegs", lambda *args: [image // 2 for image in decode(*args)])
    with pytest.raises(ValueError, match="cpu decodes a known JPEG to other pixels, 6[0-9].. levels away"):
        check_decoder(CPU)


def test_without_a_gpu_one_line_says_that_it_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    check_decoder.cache_clear()
    check_decoder(CPU), check_decoder(CPU)
    assert [record.message for record in caplog.records if "slower than --decode fast" in record.message] == [
        "--decode gpu without a GPU: this process decodes the JPEGs, slower than --decode fast does."
    ]


def test_the_benchmark_prints_rates_and_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        render(200, 150, seed=seed).save(tmp_path / f"{seed}.png")
    line = f"--device cpu --batch-size 3 --rounds 1 --sizes 96 --photos {tmp_path} --out {tmp_path}/out.json"
    assert benchmark(line.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["short_side"] == 96
    assert result["device_db"][0] > 50 > result["plain_chroma_db"][0] > 30
    assert json.loads((tmp_path / "out.json").read_text())["results"] == [result]


# From shards to the step


def _loader(data: Path, *, decode: str = "gpu", workers: int = 0, **aug: Any) -> TrainLoader:
    return build_train_loader(
        DataConfig(train_data=str(data), train_num_samples=24, batch_size=6, workers=workers, decode=decode),
        ImageConfig(aug_cfg=aug),
        preprocess=PreprocessConfig(size=SIZE),
        tokenizer=character_tokens,  # type: ignore[arg-type]
        rank=0,
        world_size=1,
        accum_freq=1,
        seed=1,
    )


_convert = partial(to_device, mean=(0.0,) * 3, std=(1 / 255,) * 3, device=CPU, dtype=torch.float32)


def _decoded(train_loader: TrainLoader, count: int) -> list[DeviceBatch]:
    return [_convert(batch) for batch in islice(train_loader, count)]


def _shard(directory: Path, files: Sequence[bytes]) -> Path:
    samples = [(f"{i:03d}", {"jpg": data, "txt": f"caption {i}".encode()}) for i, data in enumerate(files)]
    return write_tar(directory / "0.tar", samples)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second file is the device's."""
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"format": "PNG"}, {"quality": 50}]
    files = [encode(render(80 + i, 70, seed=i), **kinds[i % 4]) for i in range(24)]
    return _shard(tmp_path_factory.mktemp("mixed"), files)


def test_batches_are_those_of_the_fast_transform_whatever_the_files_and_workers(mixed: Path) -> None:
    fast = _decoded(_loader(mixed, decode="fast", scale=(0.4, 1.0)), 4)
    gpu, in_workers = (_decoded(_loader(mixed, workers=workers, scale=(0.4, 1.0)), 4) for workers in (0, 2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(gpu, in_workers, strict=True))
    counts = sum((batch.record.counts for batch in gpu if batch.record), Counter[str]())
    assert counts["decoded_on_host/other_jpeg"] == counts["decoded_on_host/not_jpeg"] == 6
    for ours, theirs in zip(gpu, fast, strict=True):
        assert torch.equal(ours.texts, theirs.texts)  # type: ignore[arg-type]
        assert all(psnr(a, b) > 50 for a, b in zip(ours.images, theirs.images, strict=True))
        assert sum(torch.equal(a, b) for a, b in zip(ours.images, theirs.images, strict=True)) >= 2


def test_a_resumed_loader_gives_the_same_pixels(mixed: Path) -> None:
    whole = _decoded(_loader(mixed), 6)
    interrupted = _loader(mixed)
    for batch in islice(interrupted, 3):
        interrupted.commit(batch.record)
    resumed = _loader(mixed)
    resumed.load_position(interrupted.merge([interrupted.position()]))
    for expected, batch in zip(whole[3:], _decoded(resumed, 3), strict=True):
        assert torch.equal(batch.images, expected.images)


def test_a_sample_that_only_decoding_shows_to_be_broken_is_replaced_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [encode(render(60, 50, seed=i)) for i in range(24)]
    files[4] = undecodable_jpeg()
    train_loader = _loader(_shard(tmp_path, files))
    batches = _decoded(train_loader, 4)
    for batch in batches:
        train_loader.commit(batch.record)  # type: ignore[arg-type]
    (batch,) = [batch for batch in batches if batch.record and batch.record.undecodable]
    assert batch.record is not None
    texts = token_texts(batch.texts)  # type: ignore[arg-type]
    assert "caption 4" not in texts
    (twice,) = [text for text in set(texts) if texts.count(text) == 2]
    first, second = [row for row, text in enumerate(texts) if text == twice]
    assert torch.equal(batch.images[first], batch.images[second])
    assert batch.record.samples[first].tolist() == batch.record.samples[second].tolist()
    assert (skipped(train_loader.totals), train_loader.totals["skipped/broken_image"]) == (1, 1)
    assert train_loader.bad_shards == {str(tmp_path / "0.tar"): 1}
    assert "0.tar cannot be decoded: another was shown twice" in caplog.text


def test_a_batch_of_nothing_but_broken_images_shows_the_next_one_twice(tmp_path: Path) -> None:
    files = [encode(render(60, 50, seed=i)) for i in range(24)]
    whole = _decoded(_loader(_shard(tmp_path, files)), 4)
    for text in token_texts(whole[1].texts):  # type: ignore[arg-type]
        files[int(text.split()[1])] = undecodable_jpeg()
    train_loader = _loader(_shard(tmp_path, files))
    batches = list(islice(load_to_device(iter(train_loader), to_device=_convert, device=CPU), 4))
    for batch, expected in zip(batches, (whole[0], whole[2], whole[2], whole[3]), strict=True):
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.texts, expected.texts)  # type: ignore[arg-type]
    records = [batch.record for batch in batches if batch.record is not None]
    assert torch.equal(records[1].samples, records[2].samples)
    for record in records[:2]:
        train_loader.commit(record)
    assert train_loader.totals["skipped/broken_image"] == 6
    resumed = _loader(tmp_path / "0.tar")
    resumed.load_position(train_loader.merge([train_loader.position()]))
    (next_batch,) = _decoded(resumed, 1)
    assert torch.equal(next_batch.images, batches[2].images)


def test_data_of_nothing_but_broken_images_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_MOST_UNDECODABLE", 12)
    train_loader = _loader(_shard(tmp_path, [undecodable_jpeg()] * 6))
    with pytest.raises(ValueError, match="12 images in a row cannot be decoded: `clipyard data inspect` shows why"):
        next(load_to_device(iter(train_loader), to_device=_convert, device=CPU))


def _position_after_others(train_loader: TrainLoader) -> StreamPosition:
    """The beginning, after many samples that another start has counted."""
    earlier = Counter({"read": 1000, "decoded_on_host/recoloured": 1000})
    return replace(train_loader.merge([train_loader.position()]), totals=earlier)


def test_one_line_tells_what_share_the_host_decodes(
    mixed: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_SAMPLES_OF_THE_SHARE", 20)
    train_loader = _loader(mixed)
    with caplog.at_level(logging.INFO):
        train_loader.load_position(_position_after_others(train_loader))
        for batch in _decoded(train_loader, 6):
            assert batch.record is not None
            train_loader.commit(batch.record)
    (line,) = [record.message for record in caplog.records if "decoded on the host" in record.message]
    assert line.startswith("--decode gpu: 50.0 % of the images so far were decoded on the host: {")
    assert "'not_jpeg': 6" in line


def test_what_the_host_decodes_and_the_devices_time_are_metrics(mixed: Path) -> None:
    (batch,) = _decoded(_loader(mixed), 1)
    assert batch.record is not None
    counts = from_vector(to_vector(batch.record.counts, num_sources=1))
    metrics = data_metrics(counts, before={}, elapsed_s=1.0)
    assert metrics["data/device_decode_us_per_sample"] > 0
    assert sum(n for name, n in metrics.items() if name.startswith("data/decoded_on_host/")) >= 2
    assert not any("device" in name for name in data_metrics({"read": 1}, before={}, elapsed_s=1.0))
