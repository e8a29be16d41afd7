"""Options of views: what every method's crops share, and DINO's multi-crop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vit_suite.config.limits import Pair, Range, Share, Sides

Strength = Annotated[list[Annotated[float, Range(0, 10)]], Range(length=4)]
Ratios = Annotated[list[Annotated[float, Range(0.001, ceiling=1000)]], Range(length=2, rising=True)]
Sigmas = Annotated[list[Annotated[float, Range(0, ceiling=1000)]], Range(length=2, rising=True)]
Two = Annotated[list[Share], Range(length=2)]
Three = Annotated[list[Share], Range(length=3)]


@dataclass
class CropConfig:
    """A random resized crop, flipped and recolored; the base of every method's views."""

    SYNONYMS: ClassVar[dict[str, str]] = {"global_crops_scale": "global_scale"}

    global_crops: ClassVar[int] = 2
    local_crops: ClassVar[int] = 0

    global_size: Sides = 224
    """Side in pixels of a (global) view, or [height, width]."""
    global_scale: Pair = field(default_factory=lambda: [0.4, 1.0])
    """Area of a (global) view as a share of the image, [least, most]."""
    ratio: Ratios = field(default_factory=lambda: [0.75, 4 / 3])
    """Width over height of a crop, [least, most]; views of two sides need one around their own."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: Share = 0.8
    """Probability of color jitter."""
    jitter_strength: Strength = field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])
    """Largest change of brightness, contrast, saturation, hue (hue in turns)."""
    gray: Share = 0.2
    """Probability of grayscale."""
    blur_sigma: Sigmas = field(default_factory=lambda: [0.1, 2.0])
    """Standard deviation of the blur in pixels of the crop, [least, most]."""
    backend: Literal["auto", "device", "workers"] = "auto"
    """Where crops are cut: in batches on the device, or by decoding workers; auto = the faster as measured."""


@dataclass
class ViewsConfig(CropConfig):
    """Multi-crop augmentation of DINO (paper section 3.2 and main_dino.py DataAugmentationDINO)."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "local_crops_scale": "local_scale",
        "local_crops_number": "local_crops",
        "num_crops": "local_crops",
    }

    local_size: Sides = 96
    """Side in pixels of a local crop, or [height, width]."""
    local_crops: Annotated[int, Range(0, ceiling=1024)] = 8  # type: ignore[misc]  # a constant 0 in the base
    """Local crops an image; the global ones are always 2."""
    local_scale: Pair = field(default_factory=lambda: [0.05, 0.4])
    """Area of a local crop as a share of the image, [least, most]."""
    blur: Three = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probability of Gaussian blur on the first global, second global, and local crops."""
    solarize: Three = field(default_factory=lambda: [0.0, 0.2, 0.0])
    """Probability of solarization (invert above one half) on the first global, second global, and local crops."""
