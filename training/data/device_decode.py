"""Decodes the JPEGs of a batch on the device, and cuts and resizes them there: what ``--decode gpu`` asks for.

    rows of files --nvJPEG, a few dozen at a time--> pixels --crop, antialiased resize, a row each--> uint8 [B, 3, H, W]
    rows of pixels --copy---------------------------------------------------------------------------> the same batch

A file that the device refuses is decoded by this process; one that cannot be decoded at all is reported, and its row
left as it is. The CPU is a device as well, if a slow one: what is tested there is what runs on a GPU, but for the
decoder itself.

Legend: B rank batch, H and W the model's image size.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from training.data.encoded_image import EncodedCrop, EncodedRows
from training.data.fast_transform import resize
from training.data.image_file import UnusableSample, decode_image

# torchvision is imported where it is used: loader workers import this module's neighbours, and decode without it.

logger = logging.getLogger(__name__)

_CHUNK_PIXELS = 1 << 25
"""Decoded at once: 96 MiB, 128 images of 512 px. nvJPEG gains nothing from more than a hundred (docs/data.md)."""
_ALL_REFUSED = 8
"""So many files, and none that the device decodes: the fault is not theirs."""
_MOST_DIFFERENCE = 4.0
"""Mean absolute difference of the check image, in levels: decoders differ in rounding and in enlarging chroma."""


class DecodedRows(NamedTuple):
    """A batch's images on the device."""

    images: Tensor
    """uint8 [B, 3, H, W]"""
    refused: int
    """Files that the device could not decode, and this process could."""
    broken: list[int]
    """Rows whose files cannot be decoded; they hold nothing of use."""


class _File(NamedTuple):
    row: int
    data: Tensor
    """uint8 [n], on the host"""
    crop: EncodedCrop


def decode_rows(pixels: Tensor, encoded: EncodedRows, *, device: torch.device) -> DecodedRows:
    """All rows of a batch as pixels on the device. The host waits for the decoder, and for its stream between chunks.

    Args:
        pixels: uint8 [B, 3, H, W] on the host; of use in the rows that hold no file.

    Raises:
        RuntimeError: the device decodes no JPEG at all, though the host does, or has no memory for it.
    """
    images = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    files = []
    for row, taken in enumerate(encoded.take()):
        if taken is None:
            images[row].copy_(pixels[row], non_blocking=True)
        else:
            files.append(_File(row, *taken))
    refused, broken = 0, list[int]()
    for chunk in _chunks(files):
        left = _decode_chunk(chunk, images)
        here = [(file, pixels_of_file(file.data, file.crop, tuple(images.shape[2:]))) for file in left]
        for file, image in here:
            if image is not None:
                images[file.row].copy_(image)
        decoded_here = sum(image is not None for _, image in here)
        if decoded_here == len(chunk) >= _ALL_REFUSED:
            raise RuntimeError(f"{device} decodes none of {len(chunk)} JPEGs that the host can: pass --decode fast.")
        refused += decoded_here
        broken += [file.row for file, image in here if image is None]
    return DecodedRows(images, refused, broken)


def _chunks(files: Sequence[_File]) -> Iterator[list[_File]]:
    chunk: list[_File] = []
    pixels = 0
    for file in files:
        area = file.crop.size.height * file.crop.size.width
        if chunk and pixels + area > _CHUNK_PIXELS:
            yield chunk
            chunk, pixels = [], 0
        chunk.append(file)
        pixels += area
    if chunk:
        yield chunk


def _decode_chunk(chunk: Sequence[_File], images: Tensor) -> list[_File]:
    """Writes the chunk's rows of ``images``; returns the files that the device refused."""
    decoded = _decode_files([file.data for file in chunk], images.device)
    size = images.shape[2:]
    resized, rows, refused = [], [], []
    for file, image in zip(chunk, decoded, strict=True):
        if image is None or tuple(image.shape[1:]) != tuple(file.crop.size):
            refused.append(file)
            continue
        top, left, height, width = file.crop.box
        if (height, width) != file.crop.size:
            image = image[:, top : top + height, left : left + width]  # [3, h, w] -> [3, h', w']
        mode = file.crop.interpolation
        resized.append(F.interpolate(image[None].float(), size, mode=mode, antialias=True, align_corners=False))
        rows.append(file.row)
    if resized:
        levels = torch.cat(resized).round_().clamp_(0, 255).to(torch.uint8)  # n x [1, 3, H, W] -> [n, 3, H, W]
        places = torch.tensor(rows)
        if images.device.type == "cuda":
            places = places.pin_memory()  # or the copy would wait for all of the above
        images.index_copy_(0, places.to(images.device, non_blocking=True), levels)
    return refused


def _decode_files(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """uint8 [3, h, w] each, None where the device refuses; the decoder says only that one of them failed, not which."""
    try:
        return list(_decode_with_memory(files, device))
    except _Refused as refusal:
        if len(files) == 1:
            _tell_refusal(device, _first_line(refusal))
            return [None]
    middle = len(files) // 2
    return _decode_files(files[:middle], device) + _decode_files(files[middle:], device)


class _Refused(Exception):
    """The device does not decode one of the files."""


def _decode_with_memory(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """What the decoder says without memory is no verdict on the files: pixels must not depend on what else is there.

    Raises:
        _Refused: one of the files is not for this decoder. RuntimeError: the device has no memory for them.
    """
    for is_last in (False, True):
        _wait_for_stream(device)
        try:
            return _decode_jpegs(files, device)
        except RuntimeError as error:
            if not _lacks_memory(error):
                _finish_decoding(device)
                raise _Refused(_first_line(error)) from error
            if is_last:
                raise RuntimeError(
                    f"{device} has no memory left to decode {len(files)} JPEGs ({_first_line(error)}): lower "
                    "--batch-size, or pass --decode fast."
                ) from error
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # the decoder has buffers of its own, beside PyTorch's memory
    raise AssertionError


def _lacks_memory(error: BaseException) -> bool:
    """torchvision raises the same type for everything, with the cause in the text; 5 is nvJPEG's ALLOCATOR_FAILURE."""
    return re.search(r"out of memory|ALLOCATOR_FAILURE|: 5$", str(error), re.IGNORECASE | re.MULTILINE) is not None


def _finish_decoding(device: torch.device) -> None:
    """After a failure the decoder may still write to the images that it has given back, from its own stream.

    It waits for that stream when it is called again. To wait for the device would be to wait for the training step.
    """
    try:
        _decode_jpegs([_known_jpeg().file], device)
    except RuntimeError:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@lru_cache(maxsize=32)
def _tell_refusal(device: torch.device, cause: str) -> None:
    """Once for each cause."""
    logger.warning(
        "A JPEG that %s refuses (%s) is decoded by this process, as others of its kind will be: "
        "train/data/decoded_on_host/refused counts them.",
        *(device, cause),
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _wait_for_stream(device: torch.device) -> None:
    """nvJPEG writes from a stream of its own, which does not wait for ours: what was freed here must be read by now."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    images: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return images


def pixels_of_file(data: Tensor, crop: EncodedCrop, size: tuple[int, ...]) -> Tensor | None:
    """uint8 [3, H, W] of a file [n], decoded by this process; None if it cannot be decoded."""
    try:
        image = decode_image(data.numpy().tobytes())
    except UnusableSample:
        return None
    top, left, height, width = crop.box
    part = image.crop((left, top, left + width, top + height))
    return resize(torch.from_numpy(np.array(part)), (size[0], size[1]), mode=crop.interpolation)


@lru_cache(maxsize=8)
def check_decoder(device: torch.device) -> None:
    """Decodes a small image on the device and compares it with the host's, once per process, before the first step.

    Raises:
        ValueError: the device cannot decode, or decodes something else.
    """
    if device.type == "cpu":
        logger.warning("--decode gpu without a GPU: this process decodes the JPEGs, slower than --decode fast does.")
    known = _known_jpeg()
    remedy = "install a torchvision built with nvJPEG for this CUDA, or pass --decode fast"
    try:
        (image,) = _decode_jpegs([known.file], device)
    except (RuntimeError, ImportError) as error:
        if _lacks_memory(error):
            remedy = "other processes may hold its memory; free some, or pass --decode fast"
        raise ValueError(
            f"--decode gpu: JPEGs cannot be decoded on {device} ({_first_line(error)}): {remedy}."
        ) from error
    difference = (image.cpu().float() - known.pixels).abs().mean().item()  # host sync
    if difference > _MOST_DIFFERENCE:
        raise ValueError(
            f"--decode gpu: {device} decodes a known JPEG to other pixels, {difference:.1f} levels away: {remedy}."
        )


class _KnownJpeg(NamedTuple):
    file: Tensor
    """uint8 [n]"""
    pixels: Tensor
    """float [3, 64, 64], as the host decodes it"""


@lru_cache(maxsize=1)
def _known_jpeg() -> _KnownJpeg:
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    pixels = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).float()  # [64, 64, 3] -> [3, 64, 64]
    return _KnownJpeg(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8), pixels)
