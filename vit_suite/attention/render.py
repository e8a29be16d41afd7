"""Attention as pictures and files: heat maps, overlays, masks, npz. Arrays in, files out; no model.

Pictures are uint8 (H, W, 3) numpy arrays, maps float (H, W), masks bool (H, W). Every file is written beside its place and moved
there, so a stopped export leaves no half file under a final name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

# Degree-6 polynomials in x of 0..1 (constant term first; red, green, blue), fitted to matplotlib's tables of the same name by
# Matt Zucker, https://www.shadertoy.com/view/WlfXRN (public domain). Lightness rises evenly, also in grey and for the colour-blind.
_POLYNOMIALS = {
    "inferno": (
        (0.0002189403691192265, 0.001651004631001012, -0.01948089843709184),
        (0.1065134194856116, 0.5639564367884091, 3.932712388889277),
        (11.60249308247187, -3.972853965665698, -15.9423941062914),
        (-41.70399613139459, 17.43639888205313, 44.35414519872813),
        (77.162935699427, -33.40235894210092, -81.80730925738993),
        (-71.31942824499214, 32.62606426397723, 73.20951985803202),
        (25.13112622477341, -12.24266895238567, -23.07032500287172),
    ),
    "viridis": (
        (0.2777273272234177, 0.005407344544966578, 0.3340998053353061),
        (0.1050930431085774, 1.404613529898575, 1.384590162594685),
        (-0.3308618287255563, 0.214847559468213, 0.09509516302823659),
        (-4.634230498983486, -5.799100973351585, -19.33244095627987),
        (6.228269936347081, 14.17993336680509, 56.69055260068105),
        (4.776384997670288, -13.74514537774601, -65.35303263337234),
        (-5.435455855934631, 4.645852612178535, 26.3124352495832),
    ),
}


def _table(name: str) -> np.ndarray:
    x = np.linspace(0, 1, 256)[:, None]
    colours = sum(np.asarray(term) * x**power for power, term in enumerate(_POLYNOMIALS[name]))
    return (np.clip(colours, 0, 1) * 255 + 0.5).astype(np.uint8)


TABLES = {name: _table(name) for name in _POLYNOMIALS}
"""Colour maps by name: uint8 (256, 3)."""


def scale(heat: np.ndarray) -> np.ndarray:
    """A map (H, W) stretched from its own least..most to 0..1, as the official imsave does; a flat map is all 0."""
    heat = np.asarray(heat, dtype=np.float32)
    least, most = float(heat.min()), float(heat.max())
    return (heat - least) / (most - least) if most > least else np.zeros_like(heat)


def heat_map(heat: np.ndarray, colours: Literal["inferno", "viridis"] = "inferno") -> np.ndarray:
    """Colours of a map (H, W), least to most: uint8 (H, W, 3)."""
    return TABLES[colours][_levels(heat)]


def _levels(heat: np.ndarray) -> np.ndarray:
    """uint8 (H, W), 0 at the least and 255 at the most."""
    return (scale(heat) * 255 + 0.5).astype(np.uint8)


def overlay(picture: np.ndarray, heat: np.ndarray, mask: np.ndarray | None = None, opacity: float = 0.65) -> np.ndarray:
    """The map over the picture, both (H, W): what gets no attention is darkened, what gets most is tinted; `mask` gets an outline.

    The picture is first drawn in a muted tone, so that colour means attention and the object can still be recognised.
    """
    levels = _levels(heat)
    strength = (opacity * (0.45 + 0.55 * np.arange(256, dtype=np.float32) / 255))[:, None]  # (256, 1)
    tint, rest = TABLES["inferno"] * strength, (1 - strength).astype(np.float32)  # by level
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    drawn = np.empty_like(picture, order="C")
    for top in range(0, len(picture), 256):  # strips: floats of a whole photograph would take 12 bytes a pixel, several times
        strip, level = picture[top : top + 256].astype(np.float32), levels[top : top + 256]
        muted = 0.5 * strip + 0.5 * (strip @ luma)[..., None]
        drawn[top : top + 256] = (muted * rest[level] + tint[level] + 0.5).clip(0, 255)
    if mask is not None:
        border = outline(mask)  # cyan: the one hue that inferno lacks; half seen through, since small images are all border
        drawn[border] = drawn[border] // 2 + np.array((45, 127, 127), dtype=np.uint8)
    return drawn


def outline(mask: np.ndarray) -> np.ndarray:
    """The inner border of a bool mask (H, W), 1 pixel wide up to 400 pixels of shorter side and wider in proportion. The picture's own
    edge is no border."""
    inner = mask.copy()
    for _ in range(max(1, min(mask.shape) // 400)):
        shrunk = inner.copy()
        shrunk[1:] &= inner[:-1]
        shrunk[:-1] &= inner[1:]
        shrunk[:, 1:] &= inner[:, :-1]
        shrunk[:, :-1] &= inner[:, 1:]
        inner = shrunk
    return mask & ~inner


def as_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) as decoded -> (H, W, 3): one channel is grey, N channels are shown by their mean."""
    if image.shape[0] != 3:
        image = np.repeat(np.rint(image.mean(0, keepdims=True)).astype(np.uint8), 3, axis=0)
    return image.transpose(1, 2, 0)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """uint8 (H, W, 3) or (H, W), or a bool mask (H, W), which becomes 0 and 255."""
    pixels = np.ascontiguousarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels)
    # Level 1: three times faster than the default here, files a little larger.
    _replace(path, lambda file: Image.fromarray(pixels).save(file, format="PNG", compress_level=1))


def write_npz(path: Path, /, **arrays: Any) -> None:
    """Arrays and plain numbers by name, loadable with numpy.load(path) and no pickle."""
    _replace(path, lambda file: np.savez_compressed(file, **{name: np.asarray(value) for name, value in arrays.items()}))


def _replace(path: Path, write: Callable[[Any], None]) -> None:
    """Like files.write_atomically without its fsync: an export of 10,000 images writes 100,000 files, and waiting for the disk at
    each would take longer than the model. After a power cut, not after a kill, the newest files may be empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")  # short: the name itself may be at the limit
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
