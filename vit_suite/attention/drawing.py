"""What is drawn of each picture, at which size, and what the backbone saw in it.

Axes: n maps of a picture, h heads, gh x gw patches, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_suite.attention import render
from vit_suite.attention.export_options import MAPS, ExportOptions
from vit_suite.attention.guided import guided_filter
from vit_suite.attention.maps import mass_mask, upsample
from vit_suite.data.inputs import Pictures

JPEG_FROM = 2**20
"""Pixels above which an overlay is a JPEG unless the options say otherwise. At 3 megapixels one takes
3.5 MB as a PNG and 0.8 MB as a JPEG (photographs, measured)."""


@dataclass(frozen=True)
class Drawing:
    """What to draw of each picture."""

    output: Path
    formats: Sequence[str]
    maps: Sequence[str]
    threshold: float
    mode: Literal["nearest", "bilinear", "guided"]
    guided_radius: int | None
    guided_eps: float
    side: int
    """Longest side in pixels of pictures for the eye (`drawn_size`)."""
    overlay_format: Literal["auto", "png", "jpeg"]

    @staticmethod
    def of(output: Path, options: ExportOptions) -> Drawing:
        """The part of the options that decides what a picture's files look like. Each format and map counts once."""
        formats, maps = tuple(dict.fromkeys(options.formats)), tuple(dict.fromkeys(options.maps))
        looks = options.threshold, options.upsample, options.guided_radius, options.guided_eps
        return Drawing(output, formats, maps, *looks, options.draw_side, options.overlay_format)

    def labels(self, heads: int) -> list[str]:
        """The maps of a picture by the name they have in file names: head0, ..., mean, max, rollout."""
        chosen = [f"head{i}" for i in range(heads)] if "heads" in self.maps else []
        return chosen + [name for name in MAPS[1:] if name in self.maps]

    def drawn_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) at which a picture of this size is drawn: its own, or smaller with `side` as its longest side."""
        factor = self.side / max(size)
        return size if factor >= 1 else (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))

    def overlay_ending(self, size: tuple[int, int]) -> str:
        """`.png` or `.jpg`, for an overlay of a picture of this size (H, W)."""
        height, width = self.drawn_size(size)
        jpeg = height * width > JPEG_FROM if self.overlay_format == "auto" else self.overlay_format == "jpeg"
        return ".jpg" if jpeg else ".png"

    def fine(self, small: Tensor, picture: np.ndarray) -> Tensor:
        """Maps (n, gh, gw) of a picture uint8 (C, H, W) at its size: (n, H, W)."""
        size = tuple(picture.shape[1:])
        if self.mode == "nearest":
            return upsample(small, size)
        heat = upsample(small, size, "bilinear")
        if self.mode == "bilinear":
            return heat
        radius = self.guided_radius or max(1, round(size[0] / small.shape[-2]))
        return guided_filter(heat, torch.from_numpy(picture.mean(0, dtype=np.float32) / 255), radius, self.guided_eps)

    def shades(
        self, small: Tensor, picture: np.ndarray, limits: render.Limits | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maps (n, gh, gw) -> levels of color, uint8 (n, H, W), and masks of the top mass, bool (n, H, W).

        With `nearest` both are computed patch by patch and then enlarged; else they are computed pixel by pixel.
        """
        if self.mode == "nearest":  # a patch has 64 pixels or more, so enlarging the results is the cheaper order
            level = torch.from_numpy(render.levels(small.numpy(), limits))
            both = torch.cat([level, mass_mask(small, self.threshold).byte()])
            fine = upsample(both, tuple(picture.shape[1:])).numpy()
            return fine[: len(small)], fine[len(small) :].view(bool)
        smooth = self.fine(small, picture)
        return render.levels(smooth.numpy(), limits), mass_mask(smooth, self.threshold).numpy()


@dataclass
class Seen:
    """One picture and what the backbone sees in it."""

    drawing: Drawing
    path: str
    """The file, as the npz names it."""
    picture: np.ndarray
    """uint8 (C, H, W), as decoded."""
    heads: Tensor
    """(h, gh, gw): attention of all heads; no head where only the features are drawn."""
    small: Tensor
    """(n, gh, gw): the maps of `Drawing.labels`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further arrays for the npz."""
    colors: Tensor | None = None
    """(3, gh, gw): principal components of the patch features, 0..1 from dark to bright."""
    front: Tensor | None = None
    """(gh, gw): above 0 where the components are shown; everywhere when None."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the file."""
        return self.picture.shape[1], self.picture.shape[2]

    @property
    def labels(self) -> list[str]:
        """The names of the maps `small`."""
        return self.drawing.labels(len(self.heads))

    @cached_property
    def drawn(self) -> np.ndarray:
        """uint8 (C, h, w): the picture at its `drawn_size`."""
        size = self.drawing.drawn_size(self.size)
        return self.picture if size == self.size else resized(self.picture, size)


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (C, H, W) -> uint8 (C, *size), bicubic with antialiasing, channel by channel."""
    channels = [
        np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC)) for channel in picture
    ]
    return np.stack(channels)


@dataclass(frozen=True)
class Export:
    """A finished pass over all pictures, for the files that are about all of them."""

    drawing: Drawing
    pictures: Pictures
    heads: int
    """Heads of the backbone."""
    rate: float
    """Frames a second of an animation."""
    threads: int
    """Threads that may draw at a time."""
