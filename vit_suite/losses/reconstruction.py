"""The distance of a reconstruction from the clean image.

Axes: V views, B images, C channels, H x W pixels; N patches of p x p pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6
"""Added to the variance of a patch (facebookresearch/mae models_mae.py `forward_loss`)."""


def reconstruction_l1(
    output: Tensor, clean: Tensor, counted: Tensor | None = None, pixels: Tensor | None = None
) -> Tensor:
    """Mean |output - clean| over the counted pixels, in the units of the normalized image.

    Args:
        output, clean: (V, B, C, H, W).
        counted: (V, B, H, W) bool; None counts all. If no pixel counts, the loss is 0.
        pixels: the number to divide by; None takes counted.sum(). With the mean of counted.sum() over ranks here, the
            mean of the loss over ranks is the mean over the counted pixels of all ranks.
    """
    distance = (output.float() - clean).abs()
    if counted is None:
        return distance.mean()
    pixels = counted.sum() if pixels is None else pixels
    return torch.where(counted.unsqueeze(2), distance, 0).sum() / (pixels * output.shape[2]).clamp(min=1)


def psnr(output: Tensor, clean: Tensor, std: Tensor, mean: Callable[[Tensor], Tensor] = lambda error: error) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (..., C, H, W) that were divided by `std` (C,). The peak is 1. `mean`
    averages the squared error over ranks."""
    error = ((output.float() - clean) * std.view(-1, 1, 1)).square().mean()
    return -10 * torch.log10(mean(error))


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p p C): the pixels of each patch by row, column, channel (facebookresearch/mae
    `patchify`)."""
    cells = images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, p p C) of a grid (h, w) -> (B, C, h p, w p): the inverse of `patchify`."""
    cells = patches.unflatten(1, grid).unflatten(3, (patch, patch, -1))  # (B, h, w, p, p, C)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, N, 1) of each patch's pixels, with the unbiased variance."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + EPS).sqrt()


def at(patches: Tensor, places: Tensor) -> Tensor:
    """The patches (B, N, X) at `places` (B, m): (B, m, X)."""
    return patches.gather(1, places.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def masked_mse(output: Tensor, target: Tensor, asked: Tensor) -> Tensor:
    """MAE's loss: mean squared error over the pixels of the patches that are predicted.

    Args:
        output: (B, N, p p C) of all patches, or (B, m, p p C) of each image's m predicted ones.
        target: (B, N, p p C).
        asked: (B, m) int64, the places of the predicted patches.
    """
    if output.shape[1] == target.shape[1]:
        output = at(output, asked)
    return (output.float() - at(target, asked)).square().mean()
