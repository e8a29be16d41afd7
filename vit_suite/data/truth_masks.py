"""Masks of objects as people save them -> 1 object, 0 ground, -1 left out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vit_suite.data.decode import ARRAYS, JPEG, opened
from vit_suite.data.orientation import upright
from vit_suite.data.pixels import MAX_PIXELS, Unfit
from vit_suite.data.science import read_array
from vit_suite.errors import UserError

VOID = (224, 224, 192)
"""Color of index 255 in VOC's palette: left out of scores."""
SHADES = 0.05
"""A picture with a larger share of pixels between dark and bright is no mask. JPEG noise at the border of an object
stays below it, photographs do not."""
DARK, BRIGHT = 64, 192
"""Levels between which a pixel is neither dark nor bright."""
HALF = 127
"""A shade above it is object."""
MOST_COLORS = 256
"""Colors of a palette; a picture with more is no drawn mask."""
MaskValues = Literal["auto", "index", "gray"]


def read_mask(path: str | Path, values: MaskValues = "auto") -> Tensor:
    """A mask file as int8 (H, W) of 1 object, 0 ground, -1 left out; EXIF orientation is applied. UserError for a file
    that could mean two things.

    values: index = 0 is ground, 255 is left out (VOC's borders), others are objects. gray = above half is object. auto:

    - transparency: what is opaque is object (cut-outs);
    - gray with one value besides 0: that value is object;
    - colors, of palettes too: black is ground, VOC's color of 255 is left out, others are objects;
    - many colors or shades, most of them dark or bright (a mask that went through JPEG): above half is object.

    Gray files of several values are refused by auto, since they could be class numbers or shades.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"mask '{path}' is no regular file.")
    try:
        pixels, alpha = _read(path, values)
    except (UserError, Unfit) as error:
        raise UserError(f"mask '{path}' cannot be read ({error}).") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged input
        raise UserError(f"mask '{path}' cannot be read ({type(error).__name__}: {error}).") from error
    if alpha is not None and values == "auto" and alpha.min() < alpha.max():
        return _trinary(alpha > HALF)
    if pixels.ndim == 3 and pixels.shape[2] == 3 and bool((pixels == pixels[..., :1]).all()):
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] == 3 and values == "auto":
        return _of_colors(path, pixels)
    if pixels.ndim != 2:
        raise UserError(
            f"mask '{path}' has shape {pixels.shape}; expected one value a pixel, or colors with mask_values auto."
        )
    if values == "gray":
        return _trinary(pixels > (HALF if pixels.dtype == np.uint8 else 0))
    if values == "index":
        return _trinary((pixels != 0) & (pixels != 255), pixels == 255)
    kinds = np.unique(pixels)
    if len(kinds[kinds != 0]) <= 1:
        return _trinary(pixels != 0)
    if path.suffix.lower() in JPEG and _two_toned(pixels):
        return _trinary(pixels > HALF)
    listed = ", ".join(map(str, kinds[:5].tolist())) + (f", ... ({len(kinds)} in all)" if len(kinds) > 5 else "")
    raise UserError(
        f"gray mask '{path}' holds {len(kinds)} values ({listed}): say with mask_values whether they are class numbers"
        " (index) or shades (gray)."
    )


def _read(path: Path, values: MaskValues) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels (H, W) or (H, W, 3), alpha (H, W) or None)."""
    if path.suffix.lower() in ARRAYS:
        array, alpha = read_array(str(path), 1, check_pixels)[:2]
        if alpha is not None:
            raise UserError(
                f"shape {array.shape[:2]} with {array.shape[2] + 1} values a pixel; expected one, or colors"
            )
        return _finite(array[..., 0] if array.shape[2] == 1 else array), None
    with opened(str(path)) as file:
        check_pixels(file.height, file.width)
        image = upright(file)
        if image.mode == "P" and values == "index" or image.mode in ("1", "L", "F") or image.mode.startswith("I"):
            return _finite(np.asarray(image)), None
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            whole = np.asarray(image.convert("RGBA"))
            return whole[..., :3], whole[..., 3]
        return np.asarray(image.convert("RGB")), None


def check_pixels(height: int, width: int) -> None:
    """UserError for a mask that claims more pixels than photographs may have."""
    if height * width > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} allowed")


def _finite(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UserError("it holds NaN or infinity")
    return pixels


def _of_colors(path: Path, pixels: np.ndarray) -> Tensor:
    colors = pixels.reshape(-1, 3).astype(np.uint32)
    count = len(np.unique(colors[:, 0] << 16 | colors[:, 1] << 8 | colors[:, 2]))
    brightest = pixels.max(-1)
    if count > MOST_COLORS or (path.suffix.lower() in JPEG and count > 2):
        if not _two_toned(brightest):
            raise UserError(f"mask '{path}' has {count} colors of all shades: it looks like a photograph, not a mask.")
        return _trinary(brightest > HALF)
    if brightest.min() > 0 and count > 1:
        raise UserError(
            f"mask '{path}' has {count} colors, and none is black: say with mask_values index that they are class"
            " numbers."
        )
    left_out = (pixels == VOID).all(-1)
    return _trinary(pixels.any(-1) & ~left_out, left_out)


def _two_toned(shades: np.ndarray) -> bool:
    return bool(((shades > DARK) & (shades < BRIGHT)).mean() < SHADES)


def _trinary(objects: np.ndarray, left_out: np.ndarray | None = None) -> Tensor:
    mask = torch.from_numpy(objects.astype(np.int8))
    return mask if left_out is None else mask - torch.from_numpy(left_out.astype(np.int8))
