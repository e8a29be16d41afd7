"""The guided filter: a coarse map drawn to the edges of its picture (He, Sun, Tang 2010, "Guided Image Filtering", ECCV).

In every window of side 2 r + 1 the map p is fitted by a line of the picture's brightness, q = a I + b, with eps against steep lines;
a pixel gets the mean line of the windows that hold it. Where the picture is flat the map is blurred, where it has an edge the map gets
one too.

Axes: n maps, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def box_mean(values: Tensor, radius: int) -> Tensor:
    """Mean over the window of side 2 radius + 1 around each pixel, cut at the border: float64 (..., H, W) -> the same shape.

    By cumulative sums: the cost does not depend on the radius.
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

    radius: of the window, in pixels. eps: variance of the guide, in 0..1 squared, below which a window counts as flat.
    """
    guide, maps = guide.double(), maps.double()  # sums over a photograph of 12 megapixels outgrow float32
    mean, mean_maps = box_mean(guide, radius), box_mean(maps, radius)
    variance = box_mean(guide * guide, radius) - mean * mean
    slope = (box_mean(guide * maps, radius) - mean * mean_maps) / (variance + eps)
    return (box_mean(slope, radius) * guide + box_mean(mean_maps - slope * mean, radius)).clamp_min(0).float()
