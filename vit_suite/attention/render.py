"""Attention as pictures: heat maps, overlays, labels. Arrays in, arrays out; no model.

Pictures are uint8 (H, W, 3) numpy arrays, maps float (..., H, W), their levels uint8 (..., H, W), masks bool (..., H,
W): one map, or several of one picture at once, which for small pictures is several times faster than one after the
other.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from vit_suite.attention.palette import TABLES

OPACITY = 0.65
"""Of the color over the picture where attention is highest; 0.45 of that where it is lowest."""
CYAN = (90, 255, 255)
"""Of outlines: the one hue that inferno lacks; half seen through, since small images are all border."""
STRIP = 2**13
"""Pixels that are drawn at a time, 96 KiB of floats: they stay in the cache, and below the size from which malloc asks
the system for new pages each time (4 times slower here)."""
Limits = tuple[float, float]


def _mixture() -> tuple[np.ndarray, np.ndarray]:
    """Of what an overlay is mixed: float32 (512, 3) twice, the picture's share and the color that is added, by level;
    256 more for the same under an outline."""
    strength = (OPACITY * (0.45 + 0.55 * np.arange(256) / 255))[:, None]  # (256, 1)
    tint = TABLES["inferno"] * strength
    share = np.repeat(np.concatenate([1 - strength, (1 - strength) / 2]), 3, axis=1)
    added = np.concatenate([tint, (tint + CYAN) / 2]) + 0.5  # half a level for rounding
    return share.astype(np.float32), added.astype(np.float32)


_SHARE, _ADDED = _mixture()


def levels(heat: np.ndarray, limits: Limits | None = None) -> np.ndarray:
    """Maps (..., H, W) as uint8: 0 at the least and 255 at the most of each map, as the official imsave; a flat map is
    all 0.

    `limits` (least, most) replaces each map's own: maps of several pictures then share their colors.
    """
    heat = np.asarray(heat, dtype=np.float32)
    least, most = (
        (heat.min((-2, -1), keepdims=True), heat.max((-2, -1), keepdims=True))
        if limits is None
        else map(np.float32, limits)
    )
    span = most - least
    scaled = (heat - least) * np.divide(255, span, out=np.zeros_like(span), where=span > 0)
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def heat_map(level: np.ndarray, colors: Literal["inferno", "viridis"] = "inferno") -> np.ndarray:
    """Colors of levels (..., H, W): uint8 (..., H, W, 3)."""
    return TABLES[colors][level]


def overlay(picture: np.ndarray, level: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Levels (..., H, W) over their picture (H, W, 3): what gets no attention is darkened, what gets most is tinted;
    `mask` gets an outline.

    The picture is first drawn in a muted tone, so that color means attention and the object can still be recognized.
    """
    drawn = np.empty((*level.shape, 3), dtype=np.uint8)
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
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
    """The inner border of bool masks (..., H, W), 1 pixel wide up to 400 pixels of shorter side and wider in
    proportion. The picture's own edge is no border."""
    inner = mask.copy()
    for _ in range(max(1, min(mask.shape[-2:]) // 400)):
        shrunk = inner.copy()
        shrunk[..., 1:, :] &= inner[..., :-1, :]
        shrunk[..., :-1, :] &= inner[..., 1:, :]
        shrunk[..., 1:] &= inner[..., :-1]
        shrunk[..., :-1] &= inner[..., 1:]
        inner = shrunk
    return mask & ~inner


def as_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) as decoded -> (H, W, 3): one channel is gray, N channels are shown by their mean."""
    if image.shape[0] != 3:
        image = np.repeat(np.rint(image.mean(0, keepdims=True)).astype(np.uint8), 3, axis=0)
    return image.transpose(1, 2, 0)


def write_npz(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Arrays and plain numbers by name, loadable with numpy.load(path) and no pickle."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez_compressed(path, **named)
