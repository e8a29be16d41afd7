"""Position embeddings that are added to tokens: fixed sines, and learned ones resized to another grid.

Axes: N = h w patches (row-major), T = prefix + N tokens, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_suite.errors import UserError

Grid = tuple[int, int]
Fixed = Literal["sincos_1d", "sincos_2d", "sincos_2d_beyer"]
"""Kinds of `sincos_positions`."""
OFFSET = 0.1
"""Patches that DINO and DINOv2 add to the target grid before they divide by the native one."""


def resize_position(
    position: Tensor, native: Grid, grid: Grid, prefix: int, how: Literal["offset", "antialias", "bicubic"] = "offset"
) -> Tensor:
    """Position embeddings (1, prefix + N, D) of the `native` grid, bicubically resized to `grid`.

    - offset: DINO and DINOv2 without registers (`interpolate_pos_encoding`). They give `scale_factor` instead of
      `size`, and add 0.1 to the target. That moves the sampling points, and the released weights expect it.
    - antialias: DINOv2 with registers. It gives `size` and antialias, whose bicubic kernel is another one even if the
      grid grows.
    - bicubic: MAE's fine-tuning and Hugging Face's ViT. They give `size` without antialias.
    """
    if grid == native:
        return position
    head, patches = position[:, :prefix], position[:, prefix:]
    patches = patches.reshape(1, *native, -1).permute(0, 3, 1, 2).float()  # (1, D, h0, w0)
    if how == "offset":
        scale = ((grid[0] + OFFSET) / native[0], (grid[1] + OFFSET) / native[1])
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic")
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=how == "antialias")
    if tuple(patches.shape[-2:]) != tuple(grid):
        raise RuntimeError(f"position embeddings came out {tuple(patches.shape[-2:])}, not {grid}")
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    return torch.cat([head, patches], dim=1)


def _waves(places: Tensor, dim: int, last: bool = False) -> tuple[Tensor, Tensor]:
    """sin and cos (..., dim / 2) of places at wavelengths from 2 pi to 10,000 x 2 pi; that longest one belongs to a
    wave after the last, or with `last` to the last one."""
    count = dim // 2
    rates = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / (max(1, count - 1) if last else count))
    angles = places.double().unsqueeze(-1) * rates
    return angles.sin(), angles.cos()


def sincos_positions(kind: Fixed, grid: tuple[int, int], dim: int, prefix: int) -> Tensor:
    """Fixed position embedding (1, T, D).

    - sincos_1d: of the place in the sequence, prefix included. Sine and cosine alternate (Vaswani et al. 2017, section
      3.5).
    - sincos_2d: four quarters sin(column), cos(column), sin(row), cos(row); the prefix has zeros (MoCo v3, MAE). The
      frequencies are 10,000^(-i / (D/4)), i from 0 to D/4 - 1.
    - sincos_2d_beyer: the same with frequencies 10,000^(-i / (D/4 - 1)) (Beyer et al. 2022, big_vision models/vit.py).
      Numbers of the two differ by at most 0.049 at 14 x 14 patches and width 384.

    UserError if D is not divisible by 2 (sincos_1d) or 4 (sincos_2d...).
    """
    need = 2 if kind == "sincos_1d" else 4
    if dim % need:
        raise UserError(f"backbone.positions {kind} needs a backbone.dim that {need} divides, not {dim}.")
    if kind == "sincos_1d":
        sine, cosine = _waves(torch.arange(prefix + grid[0] * grid[1]), dim)
        return torch.stack([sine, cosine], -1).flatten(1).float().unsqueeze(0)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    waves = [wave for places in (columns, rows) for wave in _waves(places.flatten(), dim // 2, kind.endswith("beyer"))]
    patches = torch.cat(waves, dim=-1)  # (N, D)
    return torch.cat([torch.zeros(prefix, dim, dtype=torch.float64), patches]).float().unsqueeze(0)
