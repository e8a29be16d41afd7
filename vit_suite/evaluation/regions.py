"""Connected regions of masks, their boxes, and how boxes overlap: tensors in, tensors out.

Regions are 4-connected, as scipy.ndimage.label has them by default and as LOST and TokenCut use them. A box is (x0, y0,
x1, y1), x1 and y1 exclusive. Axes: h x w cells of a mask (patches or pixels); ... any leading axes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional


def regions(masks: Tensor) -> Tensor:
    """bool (..., h, w) -> int64 (..., h, w): the number of each cell's region; -1 outside.

    The number of a region is that of its first cell, row by row. In a round, every cell takes the least number among
    its neighbours, and then the number of the cell with that number (pointer jumping). So a long region needs about as
    many rounds as it has turns, not as it has cells.
    """
    height, width = masks.shape[-2:]
    cells = height * width
    inside = masks.reshape(-1, height, width)
    numbers = torch.where(inside, torch.arange(cells, device=masks.device).view(height, width), cells)
    while True:
        edged = functional.pad(numbers, (1, 1, 1, 1), value=cells)
        around = (edged[:, 1:-1, :-2], edged[:, 1:-1, 2:], edged[:, :-2, 1:-1], edged[:, 2:, 1:-1])
        least = torch.where(inside, functools.reduce(torch.minimum, around, numbers), cells)
        flat = functional.pad(least.flatten(1), (0, 1), value=cells)  # cell number `cells` stands for the outside
        least = flat.gather(1, least.flatten(1)).view_as(numbers)
        if least.equal(numbers):
            return torch.where(inside, numbers, -1).view(masks.shape)
        numbers = least


def largest_region(masks: Tensor) -> Tensor:
    """bool (..., h, w) -> the largest region of each mask; of equal ones the first, row by row. An empty mask stays
    empty."""
    numbers = regions(masks).flatten(-2)
    sizes = torch.zeros_like(numbers).scatter_add_(-1, numbers.clamp_min(0), (numbers >= 0).long())
    return (numbers == sizes.argmax(-1, keepdim=True)).view(masks.shape)


def region_at(masks: Tensor, cells: Tensor) -> Tensor:
    """bool (..., h, w) and the number of a cell of each mask, (...), row-major -> the region that holds the cell; empty
    when the cell is outside."""
    numbers = regions(masks).flatten(-2)
    chosen = numbers.gather(-1, cells.unsqueeze(-1))
    return ((numbers == chosen) & (numbers >= 0)).view(masks.shape)


def mask_boxes(masks: Tensor) -> Tensor:
    """bool (..., h, w) -> float32 (..., 4): the smallest box around each mask, in cells; zeros for an empty mask."""
    ends = []
    for profile in (masks.any(-2), masks.any(-1)):  # (..., w), then (..., h)
        filled = profile.long()
        ends.append((filled.argmax(-1), profile.shape[-1] - filled.flip(-1).argmax(-1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack((x0, y0, x1, y1), -1).float() * masks.any(-1).any(-1).unsqueeze(-1)
