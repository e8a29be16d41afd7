"""The guided filter: it gives a coarse map the edges of its picture (He, Sun, Tang 2010, Guided Image Filtering, ECCV).

In every window of side 2 r + 1 the map p is fitted by a linear function of the picture's brightness I: q = a I + b. eps
penalizes large a. A pixel gets the mean of a and of b over the windows that hold it. Where the picture is flat the map
is blurred; where the picture has an edge the map gets one too. For large windows a and b are fitted on a smaller
picture (He, Sun 2015, "Fast Guided Filter", arXiv 1505.00996).

Axes: n maps, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

SMALL_RADIUS = 4
"""Radius of the window in the smaller picture that a and b are fitted on."""


def box_mean(values: Tensor, radius: int) -> Tensor:
    """float64 (..., H, W) -> the same shape: the mean over the window of side 2 radius + 1 around each pixel, as far as
    the window lies in the picture.

    It uses cumulative sums, so the cost does not depend on the radius.
    """
    for dim in (-2, -1):
        length = values.shape[dim]
        place = torch.arange(length)
        low, high = (place - radius).clamp_min(0), (place + radius + 1).clamp_max(length)
        sums = pad(values.cumsum(dim), (0, 0, 1, 0) if dim == -2 else (1, 0))
        count = (high - low).to(values.dtype)
        values = (sums.index_select(dim, high) - sums.index_select(dim, low)) / (count[:, None] if dim == -2 else count)
    return values


def guided_filter(maps: Tensor, guide: Tensor, radius: int, eps: float) -> Tensor:
    """maps (n, H, W) float, guide (H, W) float in 0..1 -> (n, H, W) float32, not below 0.

    radius: of the window, in pixels. eps: variance of the guide (0..1, squared) below which a window counts as flat.
    From a radius of 8 on, a and b are fitted on pictures that are radius // 4 times smaller, and interpolated.
    """
    factor = max(1, radius // SMALL_RADIUS)
    size = [-(-side // factor) for side in guide.shape]
    pair = torch.cat([guide[None], maps])[None]  # (1, 1 + n, H, W)
    pair = interpolate(pair, size=size, mode="area")[0].double()  # float32 is too short for sums over a photograph
    slope, offset = _lines(pair[1:], pair[0], max(1, round(radius / factor)), eps)
    lines = torch.cat([slope, offset])[None].float()
    slope, offset = interpolate(lines, size=guide.shape, mode="bilinear", align_corners=False)[0].chunk(2)
    return (slope * guide + offset).clamp_min(0)


def _lines(maps: Tensor, guide: Tensor, radius: int, eps: float) -> tuple[Tensor, Tensor]:
    """(a, b) of each pixel, (n, H, W) each: means over the windows that hold it."""
    mean, mean_maps = box_mean(guide, radius), box_mean(maps, radius)
    variance = box_mean(guide * guide, radius) - mean * mean
    slope = (box_mean(guide * maps, radius) - mean * mean_maps) / (variance + eps)
    return box_mean(slope, radius), box_mean(mean_maps - slope * mean, radius)
