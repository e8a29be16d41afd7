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
"""Classes up to which the picture names every row and column; beyond, cells get too small to label."""
NUMBERED = 25
"""Classes up to which every cell shows its share in percent."""
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
    """Rows: the true class, normalized to shares; columns: what the images were taken for. Darker is more."""
    count = len(classes)
    values = counts.double().numpy()
    shares = values / values.sum(1, keepdims=True).clip(min=1)
    cell = max(2, min(44, 1000 // count))
    named = count <= NAMED
    font = ImageFont.load_default(size=max(8, min(15, cell - 4)) if named else 14)
    heading = ImageFont.load_default(size=16)
    names = [shortened(name) for name in classes] if named else []
    margin = 34 + max((round(font.getlength(name)) for name in names), default=0)
    side = count * cell
    width = max(margin + side + 20, round(heading.getlength(title)) + 40)
    canvas = Image.new("RGB", (width, 40 + side + margin + 12), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((width // 2, 20), title, "black", heading, "mm")
    grid = Image.fromarray(colored(shares)).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(grid, (margin, 40))
    pen.rectangle((margin - 1, 39, margin + side, 40 + side), outline="gray")
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        pen.text((margin - 6, 40 + middle), name, "black", font, "rm")
        paste_upright(canvas, name, font, margin + middle, 40 + side + 6)
    if count <= NUMBERED:
        write_shares(pen, shares, cell, (margin, 40))
    unit = "percent of each row" if count <= NUMBERED else "darker: a larger share of the row"
    pen.text((margin + side // 2, canvas.height - 14), f"predicted ({unit})", "black", heading, "mm")
    paste_upright(canvas, "true", heading, 14, 40 + side // 2 - 16)
    return canvas


def colored(shares: np.ndarray) -> np.ndarray:
    """uint8 (K, K, 3) of shares 0..1; the square root keeps rare confusions visible."""
    place = np.sqrt(shares)
    return (
        np.stack([np.interp(place, [0, 0.5, 1], BLUE[:, channel]) for channel in range(3)], -1).round().astype(np.uint8)
    )


def write_shares(pen: ImageDraw.ImageDraw, shares: np.ndarray, cell: int, corner: tuple[int, int]) -> None:
    """The share in percent in every cell that rounds to 1 or more."""
    font = ImageFont.load_default(size=max(8, round(cell * 0.36)))
    for row, column in np.argwhere(shares >= 0.005):
        place = (corner[0] + column * cell + cell // 2, corner[1] + row * cell + cell // 2)
        pen.text(
            place, f"{100 * shares[row, column]:.0f}", "white" if shares[row, column] > 0.3 else "black", font, "mm"
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
