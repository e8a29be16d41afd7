"""TIFF files whose values Pillow would change: through tifffile, or without it what Pillow reads correctly."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from vit_suite.data.orientation import upright
from vit_suite.data.pixels import Unfit, Wide
from vit_suite.data.science import INSTALL, is_plain, read_tiff

PHOTOMETRIC, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 262, 277, 339
"""TIFF tags."""
SIGNED = 2
"""Value of the TIFF tag SampleFormat."""


def _tags(image: Any) -> Any:
    """The tags of a TIFF. (The type that Pillow declares for an open file does not have them.)"""
    return image.tag_v2


def needs_tifffile(image: Image.Image, channels: int, frame: int) -> bool:
    """Whether Pillow would change the values of a TIFF, or the bands of an N-channel one."""
    if not is_plain(_tags(image)):
        return True
    if channels in (1, 3):
        return False
    pages = 1 if frame else int(getattr(image, "n_frames", 1))
    bands = int(_tags(image).get(SAMPLES_PER_PIXEL, 1))
    return pages > 1 or bands > 4 or len(image.getbands()) != bands


def wide_tiff(
    image: Image.Image,
    file: str | io.BytesIO,
    channels: int,
    check: Callable[[int, int], None],
    frame: int,
) -> Wide:
    """A TIFF through tifffile. Without tifffile, what Pillow reads correctly: gray values of 16 and 32 bits, and gray
    pages."""
    try:
        return read_tiff(file, channels, check, frame)
    except Unfit as error:
        bands = int(_tags(image).get(SAMPLES_PER_PIXEL, 1))
        if INSTALL not in str(error) or bands != 1:
            raise
    if channels not in (1, 3) and not frame and (pages := getattr(image, "n_frames", 1)) > 1:
        if pages != channels:
            raise Unfit(f"has 1 band in {pages} pages, but data.channels is {channels}")
        found = []
        for page in range(pages):
            image.seek(page)
            found.append(np.array(image))
        return Wide(np.stack(found, -1))
    values = np.asarray(upright(image))
    # Pillow takes signed bytes for unsigned ones.
    if _tags(image).get(SAMPLE_FORMAT, (1,))[0] == SIGNED and values.dtype == np.uint8:
        values = values.view(np.int8)
    if _tags(image).get(PHOTOMETRIC) == 0 and image.mode == "I;16":  # white is zero
        values = 65535 - values
    return Wide(values[..., None])
