"""The worker's part of ``--decode gpu``: draws what is to be seen of a JPEG, and leaves decoding it to the device.

    header -> checks -> crop box, drawn as by the fast transform -> EncodedImage -> training/data/device_decode.py

Every sample shows the same part of its image as with ``--decode fast``.
"""

from __future__ import annotations

import random

from training.data.augmentation import Augmentation
from training.data.baseline_jpeg import read_baseline
from training.data.encoded_image import DecodedOnHost, EncodedImage
from training.data.fast_transform import FastTransform
from training.data.image_file import check_size

_MOST_PIXELS = 1 << 24
"""Of an image: 48 MiB decoded."""
_MOST_REDUCTION = 32
"""Of either side: the device's antialiasing kernel keeps a row's weights in its shared memory, of 48 kB."""


class DeviceTransform(FastTransform):
    """The fast transform for what the device cannot do, ``encode`` for the rest.

    Args:
        room: most bytes of a file.
    """

    def __init__(self, size: tuple[int, int], augmentation: Augmentation, *, room: int) -> None:
        super().__init__(size, augmentation)
        self.room = room

    def encode(self, data: bytes, *, seed: int, max_pixels: int = 0) -> EncodedImage:
        """The file and its crop. Whether the device decodes it depends on the file and the seed alone.

        Raises:
            UnusableSample: ``image_too_large``. DecodedOnHost: the device is not to decode it.
        """
        jpeg = read_baseline(data)
        height, width = jpeg.size
        check_size(width, height, max_pixels=max_pixels)
        rng = random.Random(seed)
        box = self.augmentation.crop.draw(height, width, rng)
        interpolation = self._interpolation(rng)
        reduction = max(box.height / self.size[0], box.width / self.size[1])
        if len(jpeg.data) > self.room or height * width > _MOST_PIXELS or reduction > _MOST_REDUCTION:
            raise DecodedOnHost("too_large")
        if self._recolours(rng):
            raise DecodedOnHost("recoloured")
        return EncodedImage(jpeg.data, jpeg.size, box, interpolation)

    def _recolours(self, rng: random.Random) -> bool:
        """Whether this sample is jittered, made grey or erased, drawn in the order of the fast transform."""
        if any(self._draw_colours(rng)):
            return True
        erasing = self.augmentation.erasing
        return erasing is not None and rng.random() <= erasing.probability
