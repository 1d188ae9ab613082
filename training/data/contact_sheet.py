"""Paints a contact sheet: images in rows, each above its caption."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

IMAGE_SIDE = 128
TEXT_HEIGHT = 62
MARGIN = 8
FONT_SIZE = 11
CHARS_PER_LINE = 21
LINES = 4


def paint_sheet(cells: Sequence[tuple[Image.Image, str]], *, columns: int) -> Image.Image:
    """The images, whole and at one size, each above its caption (cut after four lines), in 256 colours."""
    rows = -(-len(cells) // columns)
    width = columns * (IMAGE_SIDE + MARGIN) + MARGIN
    height = rows * (IMAGE_SIDE + TEXT_HEIGHT + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    for index, (image, caption) in enumerate(cells):
        row, column = divmod(index, columns)
        left = MARGIN + column * (IMAGE_SIDE + MARGIN)
        top = MARGIN + row * (IMAGE_SIDE + TEXT_HEIGHT + MARGIN)
        _paint_cell(sheet, image, caption, left=left, top=top)
    # 256 colours are enough for a sheet, and a third of the size.
    return sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _paint_cell(sheet: Image.Image, image: Image.Image, caption: str, *, left: int, top: int) -> None:
    scale = IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    place = (left + (IMAGE_SIDE - size[0]) // 2, top + (IMAGE_SIDE - size[1]) // 2)
    sheet.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    lines = textwrap.wrap(caption, CHARS_PER_LINE, max_lines=LINES, placeholder=" ...")
    # On a piece of its own: wide letters are cut off at the cell's edge.
    text = Image.new("RGB", (IMAGE_SIDE + MARGIN - 2, TEXT_HEIGHT), (255, 255, 255))
    ImageDraw.Draw(text).multiline_text(
        (0, 4),
        "\n".join(lines),
        fill=(40, 40, 48),
        font=ImageFont.load_default(FONT_SIZE),
        spacing=2,
    )
    sheet.paste(text, (left, top + IMAGE_SIDE))
