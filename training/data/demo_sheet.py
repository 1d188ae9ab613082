"""Paint a contact sheet of the demo set: its first training images with their captions."""

from __future__ import annotations

import io

from PIL import Image

from training.data.contact_sheet import paint_sheet
from training.data.demo_samples import DemoSpec, draw_sample

COLUMNS, ROWS = 7, 3


def contact_sheet(spec: DemoSpec) -> Image.Image:
    """The images as they are in the shards, enlarged, each above its caption (cut after four lines)."""
    samples = [draw_sample(spec, "train", index) for index in range(COLUMNS * ROWS)]
    cells = [(Image.open(io.BytesIO(sample.jpeg)), sample.texts[0]) for sample in samples]
    return paint_sheet(cells, columns=COLUMNS)
