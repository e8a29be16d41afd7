"""Contact sheets: rows of small pictures with a line or two of text below each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vit_suite.data.decode import DecodeError, decode
from vit_suite.data.pixels import Reading
from vit_suite.files import write_atomically

SIDE = 112
"""Side in pixels of a tile; small images are enlarged pixel by pixel up to it."""
GAP = 6
LINE = 12
"""Height in pixels of a line of text."""
FRAME = 3
LETTERS = 18
"""Letters that fit below a tile."""
GREEN, RED, BLUE = (30, 150, 60), (200, 50, 40), (40, 90, 200)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet."""

    path: str
    lines: Sequence[str] = ()
    """Text below the picture."""
    frame: tuple[int, int, int] | None = None
    """Color of a frame around it."""
    reading: Reading = Reading()
    """How the file is read."""


def write_sheet(path: Path, rows: Sequence[Sequence[Tile]], titles: Sequence[str], folder: Path | None = None) -> None:
    """Write a PNG of `rows`, each below its title. A file that does not decode is a gray tile.

    folder: the folder that relative paths start from; the working directory when None.
    """
    sheet = draw_sheet(rows, titles, folder)
    write_atomically(path, lambda temporary: sheet.save(temporary, format="PNG"))


def draw_sheet(rows: Sequence[Sequence[Tile]], titles: Sequence[str], folder: Path | None = None) -> Image.Image:
    """The sheet of `write_sheet`."""
    lines = max((len(tile.lines) for row in rows for tile in row), default=0)
    height, width = SIDE + GAP + LINE * lines, max((len(row) for row in rows), default=1) * (SIDE + GAP) + GAP
    canvas = Image.new("RGB", (width, GAP + len(rows) * (height + LINE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10)
    for number, (row, title) in enumerate(zip(rows, titles, strict=True)):
        top = GAP + number * (height + LINE + GAP)
        pen.text((GAP, top), title, "black", font)
        for place, tile in enumerate(row):
            left = GAP + place * (SIDE + GAP)
            picture = thumbnail(tile, folder)
            canvas.paste(picture, (left + (SIDE - picture.width) // 2, top + LINE + (SIDE - picture.height) // 2))
            if tile.frame is not None:
                pen.rectangle(
                    (left, top + LINE, left + SIDE - 1, top + LINE + SIDE - 1), outline=tile.frame, width=FRAME
                )
            for line, text in enumerate(tile.lines):
                pen.text((left, top + LINE + SIDE + 1 + line * LINE), shortened(text), "black", font)
    return canvas


def thumbnail(tile: Tile, folder: Path | None) -> Image.Image:
    """The picture of a tile within SIDE x SIDE; a gray square where it does not decode."""
    inner = SIDE - 2 * FRAME
    try:
        pixels = decode(tile.path if folder is None else folder / tile.path, 3, None, tile.reading)
    except DecodeError:
        return Image.new("RGB", (inner, inner), (190, 190, 190))
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    scale = inner / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def shortened(text: str) -> str:
    """Text that fits below a tile."""
    return text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
