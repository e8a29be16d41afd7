"""How far a reconstruction is from the clean image. Axes: V views, B images, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def reconstruction_l1(
    output: Tensor, clean: Tensor, counted: Tensor | None = None, pixels: Tensor | None = None
) -> Tensor:
    """Mean |output - clean| over the pixels that count (all when None), in the units of the normalized image.

    Args:
        output, clean: (V, B, C, H, W).
        counted: (V, B, H, W) bool. Where nothing counts the loss is 0.
        pixels: how many to divide by, counted.sum() when None. With the mean of that over ranks, the mean of the loss
            over ranks is the mean over all pixels that count.
    """
    distance = (output.float() - clean).abs()
    if counted is None:
        return distance.mean()
    pixels = counted.sum() if pixels is None else pixels
    return torch.where(counted.unsqueeze(2), distance, 0).sum() / (pixels * output.shape[2]).clamp(min=1)


def psnr(output: Tensor, clean: Tensor, std: Tensor, mean: Callable[[Tensor], Tensor] = lambda error: error) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (..., C, H, W) that were divided by `std` (C,); the peak is 1. `mean`
    takes the squared error to its mean over ranks."""
    error = ((output.float() - clean) * std.view(-1, 1, 1)).square().mean()
    return -10 * torch.log10(mean(error))
