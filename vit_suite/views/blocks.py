"""Random rectangular blocks of a batch of views: where they lie, and masks of as many of them as an area needs.

A fixed number of blocks ("slots") is drawn for each view, and they are taken in turn until the area is reached. So a
batch takes a few products, and no loop over images. `slots_of_sum` and `slots_of_union` choose the number: it is too
small for less than one view in 1,000, which then gets all of its blocks.

Axes: n views, H x W pixels of a view, M slots.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 0.05
"""Least distance of a block's corner from the far border, and least side of a gray or blurred block (v1), as a share of
the side of the view."""
GMML_SIDE = 0.3
"""Sides of gmml's blocks are below this share of the view's."""
GROUP = 16
"""Number of slots whose powers of two add up without rounding in fp32."""
MOST_SLOTS = 1024
"""Largest number of slots of gmml. An area close to the whole view would need an unlimited number."""


class Axis(NamedTuple):
    """Blocks along an axis of `size` pixels: start is one of 0 .. starts - 1, and side one of least .. most - 1."""

    size: int
    starts: int
    least: int
    most: int
    align: int = 1
    """Start and side become multiples of it: start is rounded down, side to the nearest (halves to even)."""

    def extent(self, start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """First pixel, and the pixel after the last one, cut at the border. start, side: whole numbers, as floats."""
        start = (start / self.align).floor() * self.align
        side = (torch.minimum(side, self.size - start) / self.align).round() * self.align
        return start, (start + side).clamp(max=self.size)

    def drawn(self, start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """`extent` from uniform numbers in [0, 1)."""
        return self.extent(integers(start, 0, self.starts), integers(side, self.least, self.most))

    def every(self) -> tuple[Tensor, Tensor]:
        """`extent` of all equally likely blocks, (starts * sides,) each."""
        start = torch.arange(max(self.starts, 1), device="cpu").double()
        side = torch.arange(self.least, max(self.most, self.least + 1), device="cpu").double()
        return self.extent(*(grid.flatten() for grid in torch.meshgrid(start, side, indexing="ij")))

    def inside(self, start: Tensor, stop: Tensor) -> Tensor:
        """(..., size) bool, pixels from start to before stop (...)."""
        pixels = torch.arange(self.size, device=start.device, dtype=start.dtype)
        return (pixels >= start.unsqueeze(-1)) & (pixels < stop.unsqueeze(-1))


class Plane(NamedTuple):
    """Blocks on a view: along its columns and along its rows."""

    down: Axis
    across: Axis

    def drawn(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, bottom, left, right (...), bottom and right exclusive, from uniform (..., 4)."""
        top, height, left, width = uniform.unbind(-1)
        return (*self.down.drawn(top, height), *self.across.drawn(left, width))

    def area(self) -> tuple[float, float]:
        """Mean of a block's area, and of its square, in pixels."""
        lengths = [stop - start for start, stop in (self.down.every(), self.across.every())]
        first, second = ((lengths[0] ** power).mean().item() * (lengths[1] ** power).mean().item() for power in (1, 2))
        return first, second

    def covered(self) -> Tensor:
        """(H, W) probability that a block covers the pixel."""
        return torch.outer(*(axis.inside(*axis.every()).double().mean(0) for axis in self))


def integers(uniform: Tensor, least: int, above: int) -> Tensor:
    """Whole numbers, as floats, equally likely in [least, above) from uniform ones; `least` when that range is
    empty."""
    return (
        uniform * max(above - least, 1)
    ).floor() + least  # u <= 1 - 2^-24, whose product with a count < 2^24 stays below it in fp32


def plane_of_one(height: int, width: int) -> Plane:
    """The gray, the blurred and the recolored block: sides from 5% to the whole view."""
    tolerances = [max(1, int(TOLERANCE * size)) for size in (height, width)]
    return Plane(*(Axis(size, size - far, far, size) for size, far in zip((height, width), tolerances, strict=True)))


def plane_of_many(height: int, width: int, side: tuple[float, ...]) -> Plane:
    """The blocks of noise and of another image of `blocks`. side: [least, most] as shares; a block has at least one
    pixel."""
    return Plane(
        *(
            Axis(size, size - max(1, int(TOLERANCE * size)), max(1, int(side[0] * size)), int(side[1] * size))
            for size in (height, width)
        )
    )


def plane_of_gmml(height: int, width: int, align: int) -> Plane:
    """The blocks of `gmml`. The last row and column of `align` pixels are reached only by blocks that start before
    them."""
    return Plane(*(Axis(size, size - align, align, int(GMML_SIDE * size), align) for size in (height, width)))


@functools.lru_cache(maxsize=64)
def reached(plane: Plane) -> float:
    """Share of the pixels that blocks can cover at all."""
    return (plane.covered() > 0).double().mean().item()


@functools.lru_cache(maxsize=64)
def slots_of_sum(plane: Plane, area: float) -> int:
    """Number of blocks to draw so that their areas add up to `area` pixels: the expected sum less 5 deviations is at
    least `area`."""
    mean, square = plane.area()
    spread = 5 * (square - mean**2) ** 0.5
    return (
        int(((spread + (spread**2 + 4 * mean * area) ** 0.5) / (2 * mean)) ** 2) + 1
    )  # m mean - spread sqrt(m) = area


@functools.lru_cache(maxsize=64)
def slots_of_union(plane: Plane, area: float) -> int:
    """Number of blocks to draw, in whole groups, so that their union has `area` pixels: the expected union less 5
    deviations is at least `area`.

    Of its area a, a block adds on average the share q that the other blocks leave free. So the variance of the union of
    m blocks is about m q^2 E[a^2] (Efron and Stein). If little is free, single cells of align x align pixels decide,
    which adds q H W align^2. The sum is 2 to 8 times the measured variance for 30% to 75% of a view of 32 pixels with
    `align` 1 and 4.
    """
    missed, (_, square), most = 1 - plane.covered(), plane.area(), reached(plane)
    pixels, cell = missed.numel(), plane.down.align * plane.across.align
    for count in range(GROUP, MOST_SLOTS, GROUP):
        free = (missed**count).mean().item() - (1 - most)  # of the pixels that blocks reach
        if (most - free) * pixels - 5 * (free**2 * count * square + free * pixels * cell) ** 0.5 >= area:
            return count
    return MOST_SLOTS


def mask_of_sum(plane: Plane, uniform: Tensor, budget: Tensor) -> Tensor:
    """(n, H, W) bool of blocks. They are taken in turn while the sum of the areas before is below the budget; overlaps
    count twice.

    uniform: (n, M, 4). budget: (n,) pixels.
    """
    top, bottom, left, right = plane.drawn(uniform)  # (n, M)
    areas = (bottom - top) * (right - left)
    used = areas.cumsum(-1) - areas < budget.unsqueeze(-1)
    rows = plane.down.inside(top, torch.where(used, bottom, top))  # (n, M, H)
    return torch.bmm(rows.float().transpose(1, 2), plane.across.inside(left, right).float()) > 0


def mask_of_union(plane: Plane, uniform: Tensor, budget: Tensor) -> Tensor:
    """(n, H, W) bool of blocks. They are taken in turn while the pixels covered before are below the budget; overlaps
    count once.

    uniform: (n, M, 4), M in whole groups. budget: (n,) pixels. First the slot that covers each pixel first is found:
    slot k of a group adds 2^-k to its pixels, 16 such powers add up exactly, and the exponent of the sum is that of the
    first slot. Then the number of pixels that each slot covers first tells how many slots are used.
    """
    count, slots = uniform.shape[:2]
    top, bottom, left, right = plane.drawn(uniform)
    weight = torch.exp2(-torch.arange(GROUP, device=uniform.device, dtype=torch.float32)).view(-1, 1)
    first = torch.full((count, plane.down.size, plane.across.size), slots, dtype=torch.int32, device=uniform.device)
    for begin in range(slots - GROUP, -1, -GROUP):
        part = slice(begin, begin + GROUP)
        rows = plane.down.inside(top[:, part], bottom[:, part]) * weight  # (n, 16, H)
        powers = torch.bmm(rows.transpose(1, 2), plane.across.inside(left[:, part], right[:, part]).float())
        exponent = powers.view(torch.int32) >> 23  # IEEE 754: 127 for 2^0; 0 where no block of the group is
        first = torch.where(exponent > 0, begin + 127 - exponent, first)
    flat = first.flatten(1).long()
    new = torch.zeros(count, slots + 1, dtype=torch.int32, device=uniform.device)
    new.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    new = new[:, :slots]
    used = (new.cumsum(-1) - new < budget.unsqueeze(-1)).sum(-1)  # how many slots: the areas before them only grow
    return first < used.view(-1, 1, 1)


def mask_of_one(plane: Plane, uniform: Tensor) -> Tensor:
    """(n, H, W) bool of one block each. uniform: (n, 4)."""
    top, bottom, left, right = plane.drawn(uniform)
    return plane.down.inside(top, bottom).unsqueeze(2) & plane.across.inside(left, right).unsqueeze(1)
