"""What an export will write, from the sizes of some images: said before a folder is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from vit_suite.attention.drawing import Drawing
from vit_suite.attention.formats import FORMATS, files_of
from vit_suite.data.decode import DecodeError, image_size
from vit_suite.data.inputs import Pictures
from vit_suite.data.reading import try_load
from vit_suite.errors import counted

SAMPLED = 16
"""Images, evenly spaced, whose headers are read."""
JPEG_BYTES = 0.25
"""Bytes a pixel of a JPEG overlay of a photograph."""
LEAST_BYTES = 1024
"""Bytes of a small file: headers and what does not compress."""
MB = 10**6


def estimate(pictures: Pictures, drawing: Drawing, heads: int) -> str:
    """One or two lines: number and size of the files, and a warning where the disk has less room.

    The files about all pictures (coco.json, animations) are not counted.
    """
    sizes = list(_sizes(pictures))
    if not sizes:
        return counted(len(pictures), "image")
    count, total = 0, 0.0
    for size in sizes:
        for kind, _, name in files_of(drawing, "image", heads, size):
            row = FORMATS[kind]
            height, width = size if row.own_size else drawing.drawn_size(size)
            rate = JPEG_BYTES if name.endswith(".jpg") else row.bytes_a_pixel
            total += max(LEAST_BYTES, rate * height * width)
            count += 1
    share = len(pictures) / len(sizes)
    need = total * share
    text = f"{counted(len(pictures), 'image')}: about {counted(round(count * share), 'file')}, {_spelled(need)}"
    if any(drawing.drawn_size(size) != size for size in sizes):
        text += f"; overlays and heat maps are drawn at {drawing.side} pixels at most (draw_side)"
    free = shutil.disk_usage(_existing(drawing.output)).free
    if need > free:
        text += f"\nthe disk of '{drawing.output}' has only {_spelled(free)} left"
    return text


def _sizes(pictures: Pictures) -> Iterator[tuple[int, int]]:
    """(H, W) of some images, from their headers; of images without a header (arrays, data sets in one file) by
    decoding the first."""
    count = min(SAMPLED, len(pictures))
    decoded = False
    for index in (number * len(pictures) // count for number in range(count)):
        size = image_size(pictures.path(index), pictures.source.reading.frame)
        if size is None and not decoded:
            image, decoded = try_load(pictures.source.load, index), True
            size = None if isinstance(image, DecodeError) else (image.shape[1], image.shape[2])
        if size is not None:
            yield size


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _spelled(size: float) -> str:
    return f"{size / (1000 * MB):,.1f} GB" if size >= 1000 * MB else f"{max(1, round(size / MB))} MB"
