"""Paint a contact sheet of the demo set: its first training images with their captions."""

from __future__ import annotations

import io
import textwrap

from PIL import Image, ImageDraw, ImageFont

from training.data.demo_samples import DemoSample, DemoSpec, draw_sample

COLUMNS, ROWS = 7, 3
IMAGE_SIDE = 128
TEXT_HEIGHT = 62
MARGIN = 8
FONT_SIZE = 11
CHARS_PER_LINE = 21
LINES = 4


def contact_sheet(spec: DemoSpec) -> Image.Image:
    """The images as they are in the shards, enlarged, each above its caption (cut after four lines)."""
    width = COLUMNS * (IMAGE_SIDE + MARGIN) + MARGIN
    height = ROWS * (IMAGE_SIDE + TEXT_HEIGHT + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for index in range(COLUMNS * ROWS):
        row, column = divmod(index, COLUMNS)
        left = MARGIN + column * (IMAGE_SIDE + MARGIN)
        top = MARGIN + row * (IMAGE_SIDE + TEXT_HEIGHT + MARGIN)
        _paste_cell(sheet, draw_sample(spec, "train", index), left=left, top=top)
    # 256 colours are enough for a sheet, and a third of the size.
    return sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _paste_cell(sheet: Image.Image, sample: DemoSample, *, left: int, top: int) -> None:
    image = Image.open(io.BytesIO(sample.jpeg))
    sheet.paste(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC), (left, top))
    lines = textwrap.wrap(sample.texts[0], CHARS_PER_LINE, max_lines=LINES, placeholder=" ...")
    ImageDraw.Draw(sheet).multiline_text(
        (left, top + IMAGE_SIDE + 4),
        "\n".join(lines),
        fill=(40, 40, 48),
        font=ImageFont.load_default(FONT_SIZE),
        spacing=2,
    )
