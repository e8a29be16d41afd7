"""The confusion matrix as a picture and as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vit_suite.files import safe_cell, write_atomically

NAMED = 50
"""Largest number of classes whose rows and columns are named; cells of more classes are too small."""
NUMBERED = 25
"""Largest number of classes whose cells show their share in percent."""
TOP = 40
"""Pixels above the matrix, for the title."""
LARGEST_CELL, LARGEST_SIDE = 44, 1000
"""Pixels of a cell, and of the whole matrix as long as cells have 2 pixels or more."""
WRITTEN = 0.005
"""Share from which a cell shows a number: it rounds to 1 percent."""
DARK = 0.3
"""Share from which a cell is so dark that its number is white."""
BLUE = np.array([[247, 251, 255], [107, 174, 214], [8, 48, 107]], dtype=np.float64)
"""Colors of the shares 0, 1/2 and 1."""


def save_confusion(folder: str | Path, counts: Tensor, classes: Sequence[str], title: str) -> None:
    """Write `confusion.png` (rows normalized) and `confusion.csv` (counts) of int (K, K) counts into `folder`."""
    folder = Path(folder)

    def table(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names = [safe_cell(name) for name in classes]
            writer.writerow(["true \\ predicted", *names])
            writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))

    write_atomically(folder / "confusion.csv", table)
    picture = confusion_picture(counts, classes, title)
    write_atomically(folder / "confusion.png", lambda path: picture.save(path, format="PNG"))


def confusion_picture(counts: Tensor, classes: Sequence[str], title: str) -> Image.Image:
    """Rows are true classes, normalized to shares; columns are what the images were taken for. Darker is more."""
    count = len(classes)
    values = counts.double().numpy()
    shares = values / values.sum(1, keepdims=True).clip(min=1)
    cell = max(2, min(LARGEST_CELL, LARGEST_SIDE // count))
    named = count <= NAMED
    font = ImageFont.load_default(size=max(8, min(15, cell - 4)) if named else 14)
    heading = ImageFont.load_default(size=16)
    names = [shortened(name) for name in classes] if named else []
    margin = 34 + max((round(font.getlength(name)) for name in names), default=0)
    side = count * cell
    width = max(margin + side + 20, round(heading.getlength(title)) + 40)
    canvas = Image.new("RGB", (width, TOP + side + margin + 12), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((width // 2, 20), title, "black", heading, "mm")
    grid = Image.fromarray(colored(shares)).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(grid, (margin, TOP))
    pen.rectangle((margin - 1, TOP - 1, margin + side, TOP + side), outline="gray")
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        pen.text((margin - 6, TOP + middle), name, "black", font, "rm")
        paste_upright(canvas, name, font, margin + middle, TOP + side + 6)
    if count <= NUMBERED:
        write_shares(pen, shares, cell, (margin, TOP))
    unit = "percent of each row" if count <= NUMBERED else "darker: a larger share of the row"
    pen.text((margin + side // 2, canvas.height - 14), f"predicted ({unit})", "black", heading, "mm")
    paste_upright(canvas, "true", heading, 14, TOP + side // 2 - 16)
    return canvas


def colored(shares: np.ndarray) -> np.ndarray:
    """Colors uint8 (K, K, 3) of shares 0..1. The square root keeps rare confusions visible."""
    place = np.sqrt(shares)
    return (
        np.stack([np.interp(place, [0, 0.5, 1], BLUE[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)
    )


def write_shares(pen: ImageDraw.ImageDraw, shares: np.ndarray, cell: int, corner: tuple[int, int]) -> None:
    """The share in percent in every cell that rounds to 1 or more."""
    font = ImageFont.load_default(size=max(8, round(cell * 0.36)))
    for row, column in np.argwhere(shares >= WRITTEN):
        place = (corner[0] + column * cell + cell // 2, corner[1] + row * cell + cell // 2)
        pen.text(
            place, f"{100 * shares[row, column]:.0f}", "white" if shares[row, column] > DARK else "black", font, "mm"
        )


def paste_upright(
    canvas: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, middle: int, top: int
) -> None:
    """Text that reads upwards, centered on the column `middle`, ending at the row `top`."""
    left, above, right, below = map(round, font.getbbox(text))
    strip = Image.new("L", (right, below + 2), 0)
    ImageDraw.Draw(strip).text((0, 0), text, 255, font)
    strip = strip.rotate(90, expand=True)
    canvas.paste("black", (middle - (above + below) // 2, top), strip)


def shortened(name: str, most: int = 18) -> str:
    """A name that fits beside the matrix."""
    return name if len(name) <= most else name[: most - 1] + "…"
