"""Which patches a network does not see: iBOT's and DINOv2's blocks (facebookresearch/dinov2 dinov2/data/masking.py,
dinov2/data/collate.py), and MAE's random patches (arXiv 2111.06377; facebookresearch/mae models_mae.py
`random_masking`).

Every image has its own random numbers, as in the views (draw.py). So the masks do not depend on the number of ranks, on
accumulation or on a resume. No function reads a value on the host, so a GPU does not wait.

Deliberate differences from the official code of the blocks:

- Which crops are masked, and how much of each, is spread evenly over groups of `GROUP` images of the global batch;
  DINOv2 spreads it over the images of a rank.
- The search for blocks ends after `ATTEMPTS` rectangles. The official loop has no such limit. The test of the
  statistics says for how many crops the search ends early.

Axes: V = 2 crops of an image, B images, N = h w patches (row-major).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.hardware import send
from vit_suite.views.draw import Draw

GROUP = 8
"""Images whose masks are spread evenly over the range of ratios. With 2 crops an image and half of the crops masked,
8 crops of 16 have masks, one in each eighth of the range."""
ATTEMPTS = 96
"""Rectangles tried for a crop."""
PATIENCE = 10
"""Rectangles in a row that may fail before a crop's search ends (MaskingGenerator._mask)."""
LEAST_BLOCK = 4
"""Patches of the smallest block that is asked for (train.py)."""
LARGEST_BLOCK = 0.5
"""Largest block, as a share of all patches (train.py)."""
LEAST_ASPECT = 0.3
"""Height over width of a block: log-uniform from this to its inverse."""


def block_masks(numbers: Tensor, targets: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masks made of rectangles: (M, N) bool, True = masked, each with at most its target of patches.

    A rectangle of random area and shape is kept when it adds between 1 patch and what is still missing. The search ends
    when nothing is missing, or when `PATIENCE` rectangles in a row did not fit; so a mask may stay below its target.

    Args:
        numbers: (M, ATTEMPTS, 4) uniform in [0, 1): area, shape, row and column of each rectangle.
        targets: (M,) patches to mask; 0 masks none.
        grid: (h, w) in patches.
    """
    height, width = grid
    device, limit = numbers.device, math.log(1 / LEAST_ASPECT)
    rows, columns = (torch.arange(side, device=device) for side in grid)
    masks = torch.zeros(len(numbers), height, width, dtype=torch.bool, device=device)
    missing, failed = targets.float(), torch.zeros(len(numbers), device=device)
    largest = LARGEST_BLOCK * height * width
    aspects = torch.exp((2 * numbers[..., 1] - 1) * limit)
    for attempt in range(numbers.shape[1]):
        searching = (missing > 0) & (failed < PATIENCE)
        if device.type == "cpu" and not searching.any():  # on a GPU, asking would cost more than the rest
            break
        area, aspect = numbers[:, attempt, 0], aspects[:, attempt]
        most = missing.clamp(max=largest)
        area = LEAST_BLOCK + (most - LEAST_BLOCK) * area  # as random.uniform: from 4 down to `most` when that is less
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top = (numbers[:, attempt, 2] * (height - tall + 1)).floor()
        left = (numbers[:, attempt, 3] * (width - wide + 1)).floor()
        inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # (M, h)
        inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
        block = inside_rows[:, :, None] & inside_columns[:, None] & ~masks
        added = block.sum((1, 2))
        fits = searching & (tall < height) & (wide < width) & (added > 0) & (added <= most)
        masks |= block & fits[:, None, None]
        missing = missing - torch.where(fits, added, 0)
        failed = torch.where(fits, 0, failed + 1)
    return masks.flatten(1)


@dataclass(frozen=True)
class Spread:
    """How masks are spread over the crops of a group of images."""

    probability: float = 0.5
    """Share of the crops that get a mask."""
    least: float = 0.1
    """Least share of a masked crop's patches."""
    most: float = 0.5
    """Largest share of a masked crop's patches."""
    shift: bool = False
    """Whether each mask is shifted by a random number of rows and columns, around the edges (DINOv3
    `ibot.mask_random_circular_shift`)."""

    def masked(self, first: int, last: int) -> int:
        """Crops with a mask among crops `first` to `last` of the global batch. Over the N crops of a whole batch they
        add up to int(N x probability), as in the official code."""
        return int(last * self.probability) - int(first * self.probability)

    def edges(self, first: int, last: int) -> Tensor:
        """(masked + 1,) shares: masked crop i takes a share between edge i and edge i + 1."""
        return torch.linspace(self.least, self.most, self.masked(first, last) + 1, device="cpu")


class Masks(NamedTuple):
    """The masks of a micro-batch."""

    hidden: Tensor
    """(V, B, N) bool, True where the student sees the mask token."""
    most: int
    """No more patches are masked than this, whatever was drawn; known without looking at `hidden`."""


def draw_block_masks(draw: Draw, views: int, grid: tuple[int, int], spread: Spread, device: torch.device) -> Masks:
    """DINOv2's masks of `views` global crops of each image of a micro-batch."""
    group, count, patches = groups_of(draw), draw.rows.stop - draw.rows.start, grid[0] * grid[1]
    keys = group.uniform(views, purpose="mask order")  # (images of the groups, V)
    own = slice(draw.rows.start - group.rows.start, draw.rows.stop - group.rows.start)
    places = torch.cat([places_of(part) for part in keys.split(GROUP)])[own]  # (B, V)
    shares = draw.uniform(views, purpose="mask share")
    targets, most = torch.zeros(count, views, device="cpu"), 0
    for first, last in parts_of(draw):  # groups, of which the last may be smaller
        start = (draw.rows.start + first) // GROUP * GROUP
        edges = spread.edges(start * views, min(start + GROUP, draw.total) * views)
        # A rank that has a part of a group may have the crops with the most patches.
        most += sum(sorted(patches_of(edges[1:], patches).int().tolist(), reverse=True)[: (last - first) * views])
        targets[first:last] = targets_of(places[first:last], shares[first:last], edges, patches)
    numbers = draw.uniform(views, ATTEMPTS, 4, purpose="mask blocks")
    hidden = block_masks(send(numbers.flatten(0, 1), device), send(targets.flatten(), device), grid)
    if spread.shift:
        hidden = shifted(hidden, send(draw.uniform(views, 2, purpose="mask shift").flatten(0, 1), device), grid)
    return Masks(hidden.unflatten(0, (count, views)).transpose(0, 1), most)


def shifted(masks: Tensor, numbers: Tensor, grid: tuple[int, int]) -> Tensor:
    """Shift masks (M, N) down and right, around the edges, by (M, 2) uniform numbers times the rows and columns."""
    maps = masks.unflatten(1, grid)
    for axis, side in ((1, grid[0]), (2, grid[1])):
        places = torch.arange(side, device=masks.device) - (numbers[:, axis - 1 : axis] * side).floor().long()
        index = places.remainder(side).unsqueeze(3 - axis)
        maps = maps.gather(axis, index.expand_as(maps))
    return maps.flatten(1)


def groups_of(draw: Draw) -> Draw:
    """The same draw for all rows of the groups that the micro-batch has a part of."""
    start, stop = draw.rows.start // GROUP * GROUP, -(-draw.rows.stop // GROUP) * GROUP
    return replace(draw, rows=slice(start, min(stop, draw.total)))


def parts_of(draw: Draw) -> list[tuple[int, int]]:
    """(first, last) rows of the micro-batch in each group, counted from its own first row."""
    cuts = range(draw.rows.start // GROUP * GROUP + GROUP, draw.rows.stop, GROUP)
    ends = [draw.rows.start, *cuts, draw.rows.stop]
    return [(a - draw.rows.start, b - draw.rows.start) for a, b in pairwise(ends)]


def places_of(keys: Tensor) -> Tensor:
    """Random numbers (images, V) of a group -> the place of each crop in their order, (images, V)."""
    flat = keys.T.flatten()  # crop A of all images, then crop B
    places = torch.empty_like(flat, dtype=torch.long)
    places[flat.argsort(stable=True)] = torch.arange(len(flat), device=flat.device)
    return places.unflatten(0, keys.T.shape).T


def targets_of(places: Tensor, shares: Tensor, edges: Tensor, patches: int) -> Tensor:
    """Patches to mask of each crop: int(patches x a share drawn between two edges); 0 from the last edge on."""
    masked = places < len(edges) - 1
    low = edges[places.clamp(max=len(edges) - 2)] if len(edges) > 1 else torch.zeros_like(shares)
    high = edges[(places + 1).clamp(max=len(edges) - 1)]
    found = patches_of(low + (high - low) * shares, patches)
    return torch.where(masked, torch.minimum(found, patches_of(high, patches)), 0)  # rounding may pass the upper edge


def patches_of(shares: Tensor, patches: int) -> Tensor:
    """int(patches x share). Targets and their upper bound use it alike, so that no rounding comes between them."""
    return (patches * shares).floor()


class Split(NamedTuple):
    """The patches that a masked autoencoder sees, and those that it predicts."""

    visible: Tensor
    """(B, n) int64 places of the visible patches, in the order of their random numbers."""
    order: Tensor
    """(B, N) int64: the place of each patch among the visible ones (the first n), then the hidden ones."""
    asked: Tensor
    """(B, m) int64 places of the patches that are predicted, in row-major order."""
    predicted: Tensor
    """(B, N) bool, True at those."""


def random_patches(noise: Tensor, mask_ratio: float, predict_ratio: float | None = None) -> Split:
    """MAE's masking by sorted noise.

    Args:
        noise: (B, N) uniform; the smallest are visible.
        mask_ratio: share of the patches that is hidden; int(N (1 - ratio)) are visible.
        predict_ratio: share of ALL patches that is predicted, those with the largest noise (CrossMAE); all hidden ones
            when None.
    """
    patches = noise.shape[1]
    visible = int(patches * (1 - mask_ratio))
    skipped = 0 if predict_ratio is None else int(patches * (mask_ratio - predict_ratio))
    shuffled = noise.argsort(dim=1)
    order = shuffled.argsort(dim=1)
    asked = shuffled[:, visible + skipped :].sort(dim=1).values
    return Split(shuffled[:, :visible], order, asked, order >= visible + skipped)
