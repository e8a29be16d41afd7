"""Attention as pictures: heat maps, overlays, labels. Arrays in, arrays out; no model.

Axes: pictures uint8 (H, W, 3), maps float (..., H, W), their levels uint8 (..., H, W), masks bool (..., H, W). The
leading axes hold several maps of one picture: for small pictures that is several times faster than one after the other.
"""

from __future__ import annotations

import numpy as np

from vit_suite.attention.palette import INFERNO

OPACITY = 0.65
"""Opacity of the color over the picture where attention is highest."""
FAINTEST = 0.45
"""The opacity where attention is lowest, as a share of `OPACITY`."""
CYAN = (90, 255, 255)
"""Color of outlines: the one hue that inferno lacks. An outline is half transparent, because a small image is nearly
all border."""
LUMA = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue (ITU-R BT.601)."""
OUTLINE_SIDE = 400
"""An outline gets a pixel wider for every so many pixels of the shorter side."""
STRIP = 2**13
"""Pixels that are drawn at a time: their 96 KiB of floats stay in the cache, and malloc gives them without asking the
system for new pages (4 times slower here)."""
Limits = tuple[float, float]


def _mixture() -> tuple[np.ndarray, np.ndarray]:
    """How an overlay is mixed, by level: the picture's share, and the color that is added; float32 (512, 3) each.

    Rows 256 to 511 are for pixels under an outline.
    """
    strength = (OPACITY * (FAINTEST + (1 - FAINTEST) * np.arange(256) / 255))[:, None]  # (256, 1)
    tint = INFERNO * strength
    share = np.repeat(np.concatenate([1 - strength, (1 - strength) / 2]), 3, axis=1)
    added = np.concatenate([tint, (tint + CYAN) / 2]) + 0.5  # half a level, so that cutting off rounds
    return share.astype(np.float32), added.astype(np.float32)


_SHARE, _ADDED = _mixture()


def levels(heat: np.ndarray, limits: Limits | None = None) -> np.ndarray:
    """Maps (..., H, W) as uint8: 0 at the least and 255 at the largest value of each map. A flat map is all 0.

    `limits` (least, most) replace each map's own values: maps of several pictures then share their colors.
    Source: matplotlib's imsave, which DINO's visualize_attention.py calls.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if limits is None:
        least, most = heat.min((-2, -1), keepdims=True), heat.max((-2, -1), keepdims=True)
    else:
        least, most = map(np.float32, limits)
    span = most - least
    scaled = (heat - least) * np.divide(255, span, out=np.zeros_like(span), where=span > 0)
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def heat_map(level: np.ndarray) -> np.ndarray:
    """Colors of levels (..., H, W): uint8 (..., H, W, 3)."""
    return INFERNO[level]


def overlay(picture: np.ndarray, level: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Levels (..., H, W) over their picture (H, W, 3): uint8 (..., H, W, 3).

    Parts with little attention are darkened, parts with much are tinted, and `mask` gets an outline. The picture is
    muted first, so that color means attention and the object can still be recognized.
    """
    drawn = np.empty((*level.shape, 3), dtype=np.uint8)
    luma = np.array(LUMA, dtype=np.float32)
    border = np.broadcast_to(np.False_ if mask is None else outline(mask), level.shape)
    rows = max(1, STRIP // (level.size // level.shape[-2]))
    for top in range(0, len(picture), rows):
        part = slice(top, top + rows)
        strip = picture[part].astype(np.float32)
        here = level[..., part, :] + np.intp(256) * border[..., part, :]
        colors = np.take(_SHARE, here, axis=0)
        colors *= 0.5 * strip + 0.5 * (strip @ luma)[..., None]
        colors += np.take(_ADDED, here, axis=0)
        drawn[..., part, :, :] = colors
    return drawn


def outline(mask: np.ndarray) -> np.ndarray:
    """The inner border of bool masks (..., H, W), 1 pixel wide up to 799 pixels of shorter side, then wider.

    The edge of the picture itself is no border.
    """
    inner = mask.copy()
    for _ in range(max(1, min(mask.shape[-2:]) // OUTLINE_SIDE)):
        shrunk = inner.copy()
        shrunk[..., 1:, :] &= inner[..., :-1, :]
        shrunk[..., :-1, :] &= inner[..., 1:, :]
        shrunk[..., 1:] &= inner[..., :-1]
        shrunk[..., :-1] &= inner[..., 1:]
        inner = shrunk
    return mask & ~inner


def as_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) as decoded -> (H, W, 3). An image without three channels is shown as the mean of its channels."""
    if image.shape[0] != 3:
        image = np.repeat(np.rint(image.mean(0, keepdims=True)).astype(np.uint8), 3, axis=0)
    return image.transpose(1, 2, 0)
