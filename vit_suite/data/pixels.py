"""Numbers of any type -> uint8 pixels: value ranges, transparency, channels.

Axes: C channels, H height, W width.

What becomes of numbers that are wider than 8 bits (`data.value_range`):

- auto, integers: as many bits as hold the largest one (8, 10, 12, 14 or 16). Scanners and cameras store 10 or 12 bits
  in 16: read as 16 bits they would be nearly black. `registry.py` looks at the whole set first, so that all its files
  get one range; a file alone is taken by what it holds. int8 is -128..127.
- auto, floating point: 0..1. DICOM: the window that the file names, else all that its bits can hold.
- auto, everything else (negative integers, floats outside 0..1, NaN): refused, because a guess per file would give
  neighboring files different scales.
- minmax: each image from its own least (black) to its own largest value (white).
- two numbers: from the first (black) to the second (white); what lies beyond is cut to them.

With minmax and two numbers NaN is black. 8-bit files are taken as they are under every setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from vit_suite.errors import UserError, counted

BITS = (8, 10, 12, 14, 16)
"""Depths that instruments store in 16-bit numbers."""
MAX_PIXELS = 178_956_970
"""Pixels of the largest image that is read when `data.max_pixels` is not given: Pillow's own limit for a decompression
bomb. As RGB it takes 0.5 GiB."""
HINT = "data.value_range minmax, or two numbers, says what becomes black and white"


class Unfit(ValueError):
    """This one file does not give an image; the text says why."""


class ValueRange(NamedTuple):
    """Which numbers become 0 and 255."""

    mode: Literal["auto", "minmax", "fixed"] = "auto"
    low: float = 0.0
    high: float = 0.0
    """Of `fixed`; of `auto` the largest integer of the set, where one was looked at (0: each file by itself)."""


AUTO = ValueRange()


class Reading(NamedTuple):
    """How the files of a set are read: the options of `data` with these names."""

    value_range: ValueRange = AUTO
    max_pixels: int = MAX_PIXELS
    frame: int = 0
    """Which page or frame of a file that holds several, from 0."""


READING = Reading()
"""The default of every option."""


def check_frame(frame: int, count: int) -> None:
    """Unfit if a file that holds `count` pages or frames has no frame of this number."""
    if frame >= count:
        raise Unfit(f"holds {counted(count, 'frame')}; data.frame {frame} counts from 0")


def parse_range(value: str | Sequence[float] | ValueRange) -> ValueRange:
    """`data.value_range` as it is given: "auto", "minmax" or two numbers. UserError for anything else."""
    if isinstance(value, ValueRange):
        return value
    if value == "auto":
        return AUTO
    if value == "minmax":
        return ValueRange("minmax")
    if not isinstance(value, str) and len(value) == 2 and float(value[0]) < float(value[1]):
        return ValueRange("fixed", float(value[0]), float(value[1]))
    raise UserError(f"data.value_range is {value}; expected auto, minmax, or two numbers, the smaller one first.")


class Wide(NamedTuple):
    """What a file holds, before it becomes 8 bits."""

    values: np.ndarray
    """(H, W, C), any type of number."""
    alpha: np.ndarray | None = None
    """(H, W) in 0..1, 0 = transparent."""
    bits: int | None = None
    """Bits of a value, where the file says that it uses fewer than its type has."""
    window: tuple[float, float] | None = None
    """The values that are shown black and white, where the file names them (DICOM)."""

    def extremes(self) -> tuple[float, float]:
        """Least and largest value; (nan, nan) where some are not finite."""
        least, most = self.values.min(), self.values.max()
        return float(least), float(most)


def depth(most: float) -> int | None:
    """The smallest of `BITS` that holds integers up to `most`; None where none does."""
    return next((bits for bits in BITS if most < 2**bits), None)


def scale(wide: Wide, value_range: ValueRange = AUTO) -> np.ndarray:
    """uint8 of the shape of `wide.values`, by the rules of this file's docstring. Unfit where they refuse."""
    values = wide.values
    if values.size == 0:
        raise Unfit(f"the image is empty (shape {values.shape})")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise Unfit(f"numbers of type {values.dtype} are no pixels")
    if value_range.mode == "fixed":
        return _stretch(values, value_range.low, value_range.high)
    if value_range.mode == "minmax":
        return _stretch(values, *_finite_extremes(values))
    if wide.window is not None:
        return _stretch(values, *wide.window)
    return _automatic(values, wide.bits, *wide.extremes(), value_range.high)


def _automatic(values: np.ndarray, bits: int | None, least: float, most: float, set_most: float) -> np.ndarray:
    kind = f"{values.dtype} values from {least:g} to {most:g}"
    if values.dtype.kind == "f":
        if least >= 0 and most <= 1:  # NaN fails both comparisons
            return (values * 255 + 0.5).astype(np.uint8)
        raise Unfit(f"{kind}; expected floats in 0..1: {HINT}")
    if values.dtype == np.int8:
        return (values.astype(np.int16) + 128).astype(np.uint8)
    if least < 0:
        raise Unfit(f"{kind}; expected no negative ones: {HINT}")
    if set_most and most > set_most:
        raise Unfit(f"{kind}, but the set is read as 0 to {set_most:g}, by the files that were looked at: {HINT}")
    bits = depth(set_most) if set_most else bits or depth(most)
    if bits is None:
        raise Unfit(f"{kind}; expected at most 16 bits: {HINT}")
    return _stretch(values, 0, 2**bits - 1)


def _finite_extremes(values: np.ndarray) -> tuple[float, float]:
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
        if not values.size:
            raise Unfit("holds no finite value")
    return float(values.min()), float(values.max())


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """low -> 0, high -> 255. A range of 2^n integers below 16 bits loses its lower bits, as cameras do it; 16 bits are
    divided by 257, as Pillow and the PNG standard do."""
    whole = values.dtype.kind in "iu" and float(low).is_integer() and float(high).is_integer()
    levels = int(high - low + 1) if whole else 0
    if whole and levels == 65536:
        return ((np.clip(values, int(low), int(high)).astype(np.int64) - int(low) + 128) // 257).astype(np.uint8)
    if whole and levels >= 256 and not levels & (levels - 1):
        shift = levels.bit_length() - 9
        return ((np.clip(values, int(low), int(high)).astype(np.int64) - int(low)) >> shift).astype(np.uint8)
    if high <= low:  # one value everywhere
        return np.zeros(values.shape, np.uint8)
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) composited on white; alpha (H, W) in 0..1."""
    share = alpha[..., None].astype(np.float32)
    return (pixels * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def unit(alpha: np.ndarray) -> np.ndarray:
    """An alpha channel of any type in 0..1; integers by what their type can hold."""
    most = np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1
    return (alpha.astype(np.float32) / most).clip(0, 1)


def finish(wide: Wide, channels: int, value_range: ValueRange, what: str) -> np.ndarray:
    """uint8 (channels, H, W), contiguous. Unfit where the number of channels does not fit."""
    pixels = scale(wide, value_range)
    if wide.alpha is not None and channels in (1, 3):
        pixels = on_white(pixels, wide.alpha)
    return convert_channels(np.ascontiguousarray(pixels.transpose(2, 0, 1)), channels, what)


def convert_channels(pixels: np.ndarray, channels: int, what: str) -> np.ndarray:
    """uint8 (..., C, H, W) -> (..., channels, H, W): luma for 3 -> 1, copies for 1 -> 3. UserError for any other
    change."""
    have = pixels.shape[-3]
    if have == channels:
        return pixels
    if have == 3 and channels == 1:  # Pillow's integer luma, so that arrays and files give the same gray
        red, green, blue = (pixels[..., i : i + 1, :, :].astype(np.uint32) for i in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)
    if have == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=-3)
    raise UserError(f"{what} has {have} channel{'s' * (have != 1)}, but data.channels is {channels}.")


def by_channels(array: np.ndarray, channels: int) -> Wide:
    """An array (H, W), (H, W, C) or (C, H, W) as an image; Unfit where no axis has a fitting number of channels.

    For 1 and 3 channels, C may be 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha).
    """
    axis = channel_axis(array.shape, channels)
    if axis is None:
        return Wide(array[..., None])
    values = np.moveaxis(array, axis, -1)
    if channels in (1, 3) and values.shape[2] in (2, 4) and values.shape[2] != channels:
        return Wide(values[..., :-1], unit(values[..., -1]))
    return Wide(values)


def channel_axis(shape: Sequence[int], channels: int) -> int | None:
    """The axis of the channels of an array of this shape, None for (H, W). Unfit where there is none."""
    if len(shape) == 2:
        return None
    fitting = (channels, 1, 3, 4, 2) if channels in (1, 3) else (channels,)
    if len(shape) == 3:
        for count in fitting:
            for axis in (2, 0):
                if shape[axis] == count:
                    return axis
        raise Unfit(f"has shape {tuple(shape)}: no axis of {channels} channels (data.channels)")
    raise Unfit(f"an array of shape {tuple(shape)} is not an image (H, W), (H, W, C) or (C, H, W)")
