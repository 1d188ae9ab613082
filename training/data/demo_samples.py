"""Draw the samples of the demo set one by one: a sample depends on the seed, its split and its index, on nothing else.

That is why processes can share the work and shards can be cut anywhere without changing a byte. No webdataset here: its
import pulls torch in, which the drawing processes do not need.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from training.data.demo_captions import caption, captions
from training.data.demo_scenes import COLOURS, SHAPES, Scene, render, sample_scene

CLASSES = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""The zero-shot classes, in the order of their numbers: chance is 1 in 80."""
CLASS_NAMES = tuple(f"{colour} {shape}" for colour, shape in CLASSES)
CAPTIONS_PER_IMAGE = 5
"""Of the retrieval set, as in Flickr30k and COCO."""


@dataclass(frozen=True)
class DemoSpec:
    """What to make. Equal specs give equal bytes (with the same versions of Python, Pillow and numpy)."""

    samples: int = 16_384
    """Training samples; the evaluation sets are smaller fractions of it, up to a limit."""
    shards: int = 16
    seed: int = 0
    image_size: int = 64
    """Pixels per side."""

    def __post_init__(self) -> None:
        if not 8 <= self.shards <= self.samples:
            raise ValueError(
                f"{self.shards} shards for {self.samples} samples: pass --shards from 8 up to the number of samples "
                "(fewer than 8 could not feed several loader workers or ranks)"
            )
        if not 32 <= self.image_size <= 512:
            raise ValueError(f"images of {self.image_size} px: pass --image-size from 32 to 512")

    @property
    def val_samples(self) -> int:
        return min(512, max(16, self.samples // 32))

    @property
    def zeroshot_samples(self) -> int:
        return len(CLASSES) * min(12, max(1, self.samples // 1024))

    @property
    def retrieval_samples(self) -> int:
        return min(500, max(16, self.samples // 32))

    @property
    def csv_samples(self) -> int:
        """Training samples that are also written as CSV and single files."""
        return min(2048, self.samples)


@dataclass(frozen=True)
class DemoSample:
    """One image as JPEG bytes with its texts; `label` is the class number in the zero-shot set, else None."""

    key: str
    jpeg: bytes
    texts: tuple[str, ...]
    label: int | None = None


def plan_sample(spec: DemoSpec, split: str, index: int) -> tuple[Scene, tuple[str, ...]]:
    """What sample `index` of `train`, `val`, `zeroshot` or `retrieval` shows, and its texts; nothing is painted."""
    # Seeded with a string: Python hashes it with SHA-512, so neighbouring samples have unrelated streams.
    rng = random.Random(f"clipyard-demo/{spec.seed}/{split}/{index}")
    colour, shape = CLASSES[index % len(CLASSES)]
    if split == "zeroshot":
        scene = sample_scene(rng, held_out=True, num_things=1, colour=colour, shape=shape)
    else:
        scene = sample_scene(rng, held_out=split != "train")
    texts = captions(scene, rng, count=CAPTIONS_PER_IMAGE) if split == "retrieval" else [caption(scene, rng)]
    return scene, tuple(texts)


def draw_sample(spec: DemoSpec, split: str, index: int) -> DemoSample:
    """One sample, painted."""
    scene, texts = plan_sample(spec, split, index)
    label = index % len(CLASSES) if split == "zeroshot" else None
    return DemoSample(f"{split}-{index:06d}", _encode_jpeg(scene, spec.image_size), texts, label)


def draw_samples(span: Sequence[int], *, spec: DemoSpec, split: str) -> list[DemoSample]:
    """Several samples: the unit of work of a drawing process."""
    return list(map(partial(draw_sample, spec, split), span))


def _encode_jpeg(scene: Scene, image_size: int) -> bytes:
    buffer = io.BytesIO()
    # No chroma subsampling: at 64 px it would blur the colours over their edges.
    render(scene, image_size=image_size).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()
