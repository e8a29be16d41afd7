"""The deterministic view of evaluations: shorter side to 256/224 of the crop, center crop, normalize.

Source: DINO eval_knn.py (Resize(256), CenterCrop(224)), its proportion kept for other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_suite.config.limits import pair
from vit_suite.views.multicrop import normalize_
from vit_suite.views.resample import Size, check_pixels, resize

MARGIN = 256 / 224
"""Ratio of the shorter side after the resize to the side of the crop."""


def _center(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) fp32 in 0..1 from (B, C, H, W) of one size."""
    (height, width), (h, w) = images.shape[-2:], size
    if (height, width) != (h, w):
        # One side gets its exact length. The other keeps the ratio, and is rounded down as in torchvision's Resize.
        down, across = round(h * MARGIN), round(w * MARGIN)
        if down / height >= across / width:
            resized = (down, max(across, int(down * width / height)))
        else:
            resized = (max(down, int(across * height / width)), across)
        images = resize(images, resized)
        top, left = round((resized[0] - h) / 2), round((resized[1] - w) / 2)
        images = images[..., top : top + h, left : left + w]
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float().clone()


def eval_view(images: Tensor | Sequence[Tensor], size: Size, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, C, h, w) fp32, normalized, on the images' device. UserError as `check_pixels`.

    images: uint8 or float in 0..1, (B, C, H, W), or a list of (C, H_i, W_i). Images that already have `size` are only
    normalized.
    size: side, or (h, w), in pixels. mean, std: C floats in 0..1.
    """
    sides = pair(size)
    check_pixels(images)
    if isinstance(images, Tensor):
        return normalize_(_center(images, sides), mean, std)
    return normalize_(torch.cat([_center(image[None], sides) for image in images]), mean, std)


def view_text(size: list[int]) -> str:
    """The evaluation view, for results.json."""
    return f"shorter side to 256/224 of {size}, center crop; images of that size as they are"
