"""One picture of what a backbone found: images side by side; below each the map of a head, its mask, the truth.

Pictures are uint8 (H, W, 3) numpy arrays, maps float (gh, gw), masks bool (H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vit_suite.attention.maps import mass_mask, upsample
from vit_suite.attention.render import heat_map, levels, outline

SIDE = 144
"""Pixels of a tile's side."""
GAP = 4
"""Pixels between two tiles."""
MARGIN = 64
"""Pixels on the left, for the names of the rows."""
DIMMED = 0.25
"""Brightness of what lies outside a mask."""
ROWS = ("image", "head", "mask", "truth")
PAPER, INK = (255, 255, 255), (40, 40, 40)


class Shown(NamedTuple):
    """An image of the overview."""

    picture: np.ndarray
    """uint8 (H, W, 3)."""
    heat: torch.Tensor
    """float (gh, gw): the attention of one head."""
    truth: np.ndarray
    """bool (H, W)."""


def overview(shown: Sequence[Shown], threshold: float, side: int = SIDE) -> Image.Image:
    """A column for each image, a row for each of `ROWS`; a tile is a square of `side` pixels.

    threshold: share of the head's mass that its mask keeps. The map is interpolated to the size of the tile first, so
    that the mask has a smooth border. (Scores are taken patch by patch.)
    """
    step = side + GAP
    sheet = Image.new("RGB", (MARGIN + len(shown) * step, len(ROWS) * step), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, name in enumerate(ROWS):
        draw.text((6, row * step + side // 2 - 8), name, fill=INK, font=font)
    for column, one in enumerate(shown):
        for row, tile in enumerate(tiles(one, threshold, side)):
            sheet.paste(Image.fromarray(tile), (MARGIN + column * step, row * step))
    return sheet


def tiles(one: Shown, threshold: float, side: int) -> list[np.ndarray]:
    """The tiles of an image in the order of `ROWS`: uint8 (side, side, 3) each."""
    picture = np.asarray(Image.fromarray(one.picture).resize((side, side), Image.Resampling.BICUBIC))
    heat = upsample(one.heat.float(), (side, side), "bilinear")
    found = mass_mask(heat, threshold).numpy()
    truth = np.asarray(Image.fromarray(one.truth).convert("L").resize((side, side), Image.Resampling.BILINEAR)) > 127
    return [picture, heat_map(levels(heat.numpy())), cut_out(picture, found), cut_out(picture, truth)]


def cut_out(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3), dimmed outside the mask (H, W), with a white line around the mask."""
    drawn = np.where(mask[..., None], picture, (DIMMED * picture).astype(np.uint8))
    drawn[outline(mask)] = 255
    return drawn
