"""SiT's corruptions of normalised views, batched: what the network sees while it reconstructs the clean view.

`blocks` is version 1 (Atito, Awais, Kittler 2021, arXiv 2104.03602, code of July 2021): in turn a grey block, a blurred block, blocks
of noise, blocks of another image. `gmml` is version 3 (group masked model learning): blocks dropped to noise or zero, or instead
replaced by another image. `mask` hides whole patches behind a mask token (BERT). Zero is the mean colour, for views are normalised.

Deviations from the authors' code:
- The other image is the partner's CLEAN view; there it is whatever image the loop over the batch has left in that place so far.
- Blur of a block smaller than its kernel reflects as often as it takes; there it fails.
- `replace_area` 0 replaces nothing and `drop_area` 0 drops nothing; `gmml` then does the other to every view.
- Blocks are chosen among a fixed number of drawn ones ("slots"); there they are drawn until the area is reached. How many slots:
  `slots_of_sum` and `slots_of_union`, enough but for about one view in a million, which then is a little less corrupted.
- Noise is a window, at a random place, of one field a step of four views' length: cheap, and the same on every number of ranks.
- `colour`, off by default, is not in their code.

Axes: V views, B images, n <= V * B of them at a time, C channels, H x W pixels, M slots, N patches.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.config.sit import SiTConfig
from vit_suite.errors import UserError
from vit_suite.views.draw import Draw
from vit_suite.views.resample import full_precision, send

CPU_CHUNK = 1 << 18
"""Elements of views worked on at a time on a CPU (1 MiB)."""
DEVICE_CHUNK = 1 << 27
"""The same on a GPU (512 MiB), where it only bounds memory."""
TOLERANCE = 0.05
"""Share of a side that a block's corner keeps from the far border, and the least side of a grey or blurred block (v1)."""
GMML_SIDE = 0.3
"""Sides of gmml's blocks are below this share of the view's."""
REACH = 7
"""Largest radius of a blur, in pixels: kernels of 3 to 15 taps."""
GROUP = 16
"""Slots whose powers of two add up without rounding in fp32."""
MOST_SLOTS = 2048
"""Slots of gmml at most: an area close to the whole view would take any number."""
ONE, BLUR = 4, 6
"""Uniform numbers that a block takes (top, height, left, width), and a blurred one (kernel, sigma too)."""


class Corrupted(NamedTuple):
    """Corrupted views and what was done to them."""

    images: Tensor
    """(V, B, C, H, W) fp32; the very views that came in where no pixel is touched (`none`, `mask` with `token`)."""
    changed: Tensor
    """(V, B, H, W) bool, pixels that the reconstruction of corrupted pixels counts."""
    hidden: Tensor | None
    """(V, B, N) bool, patches in raster order that the network replaces by its mask token; None unless `mask`."""


class Axis(NamedTuple):
    """How blocks lie along one axis: start from whole numbers 0 .. starts - 1, side from least .. most - 1, in pixels of `size`."""

    size: int
    starts: int
    least: int
    most: int
    align: int = 1
    """Start and side become multiples of it (start down, side to the nearest, halves to even)."""

    def extent(self, start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """First pixel, and the one after the last, cut at the border, from whole numbers in floats of any one shape."""
        start = (start / self.align).floor() * self.align
        side = (torch.minimum(side, self.size - start) / self.align).round() * self.align
        return start, (start + side).clamp(max=self.size)

    def drawn(self, start: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The same from uniform numbers in [0, 1)."""
        return self.extent(integers(start, 0, self.starts), integers(side, self.least, self.most))

    def every(self) -> tuple[Tensor, Tensor]:
        """First pixel and the one after the last of all equally likely blocks, each (starts * sides,)."""
        start = torch.arange(max(self.starts, 1)).double()
        side = torch.arange(self.least, max(self.most, self.least + 1)).double()
        return self.extent(*(grid.flatten() for grid in torch.meshgrid(start, side, indexing="ij")))

    def inside(self, start: Tensor, stop: Tensor) -> Tensor:
        """(..., size) bool, pixels from start to before stop (...)."""
        pixels = torch.arange(self.size, device=start.device, dtype=start.dtype)
        return (pixels >= start.unsqueeze(-1)) & (pixels < stop.unsqueeze(-1))


class Plane(NamedTuple):
    """How blocks lie on a view."""

    down: Axis
    across: Axis

    def drawn(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, bottom, left, right (...), bottom and right exclusive, from uniform (..., 4)."""
        top, height, left, width = uniform.unbind(-1)
        return (*self.down.drawn(top, height), *self.across.drawn(left, width))

    def area(self) -> tuple[float, float]:
        """Mean of a block's area, and of its square, in pixels."""
        lengths = [stop - start for start, stop in (self.down.every(), self.across.every())]
        return tuple((lengths[0] ** power).mean().item() * (lengths[1] ** power).mean().item() for power in (1, 2))

    def covered(self) -> Tensor:
        """(H, W) probability that a block covers the pixel."""
        return torch.outer(*(axis.inside(*axis.every()).double().mean(0) for axis in self))


def integers(uniform: Tensor, least: int, above: int) -> Tensor:
    """Whole numbers, as floats, equally likely in [least, above) from uniform ones; `least` when that range is empty."""
    count = max(above - least, 1)
    return (uniform * count).floor().clamp(max=count - 1) + least  # the largest numbers below 1 would round up to count


def plane_of_one(height: int, width: int) -> Plane:
    """The grey, the blurred and the recoloured block: sides from 5% to the whole view."""
    tolerances = [max(1, int(TOLERANCE * size)) for size in (height, width)]
    return Plane(*(Axis(size, size - far, far, size) for size, far in zip((height, width), tolerances, strict=True)))


def plane_of_many(height: int, width: int, side: tuple[float, ...]) -> Plane:
    """The blocks of noise and of another image of `blocks`. side: [least, most] as shares; a block has at least one pixel."""
    return Plane(*(Axis(size, size - max(1, int(TOLERANCE * size)), max(1, int(side[0] * size)), int(side[1] * size))
                   for size in (height, width)))


def plane_of_gmml(height: int, width: int, align: int) -> Plane:
    """The blocks of `gmml`. The last row and column of `align` pixels are reached only by blocks that start before them."""
    return Plane(*(Axis(size, size - align, align, int(GMML_SIDE * size), align) for size in (height, width)))


@functools.lru_cache(maxsize=64)
def slots_of_sum(plane: Plane, area: float) -> int:
    """Blocks to draw so that their areas add up to `area` pixels: the fewest whose expected sum is that and 5 deviations."""
    mean, square = plane.area()
    spread = 5 * (square - mean**2) ** 0.5
    return int(((spread + (spread**2 + 4 * mean * area) ** 0.5) / (2 * mean)) ** 2) + 1  # m mean - spread sqrt(m) = area


@functools.lru_cache(maxsize=64)
def slots_of_union(plane: Plane, area: float) -> int:
    """Blocks to draw so that their union has `area` pixels: the fewest, in whole groups, whose expected union is 5 deviations more.

    A block adds at most its area a, and on average the share q of it that the others leave free, so the union's variance is about
    m q E[a^2] (Efron and Stein).
    """
    missed, (_, square) = 1 - plane.covered(), plane.area()
    for count in range(GROUP, MOST_SLOTS, GROUP):
        free = (missed**count).mean().item()
        if (1 - free) * missed.numel() - 5 * (count * free * square) ** 0.5 >= area:
            return count
    return MOST_SLOTS


def mask_of_sum(plane: Plane, uniform: Tensor, budget: Tensor) -> Tensor:
    """(n, H, W) bool of blocks taken in turn while the sum of the areas so far, overlaps counted twice, is below the budget.

    uniform: (n, M, 4). budget: (n,) pixels.
    """
    top, bottom, left, right = plane.drawn(uniform)  # (n, M)
    areas = (bottom - top) * (right - left)
    used = areas.cumsum(-1) - areas < budget.unsqueeze(-1)
    rows = plane.down.inside(top, torch.where(used, bottom, top))  # (n, M, H)
    return torch.bmm(rows.float().transpose(1, 2), plane.across.inside(left, right).float()) > 0


def mask_of_union(plane: Plane, uniform: Tensor, budget: Tensor) -> Tensor:
    """(n, H, W) bool of blocks taken in turn while the pixels covered so far, each counted once, are below the budget.

    uniform: (n, M, 4), M in whole groups. budget: (n,) pixels. First of all, which is the first block to cover a pixel: slot k of a
    group adds 2^-k to its pixels, 16 powers add up exactly, and the exponent of the sum is that of the first. How many pixels each
    slot is the first to cover then says how far the slots are used.
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
    used = (new.cumsum(-1) - new < budget.unsqueeze(-1)).sum(-1)  # slots, for the areas before them only grow
    return first < used.view(-1, 1, 1)


def mask_of_one(plane: Plane, uniform: Tensor) -> Tensor:
    """(n, H, W) bool of one block each. uniform: (n, 4)."""
    top, bottom, left, right = plane.drawn(uniform)
    return plane.down.inside(top, bottom).unsqueeze(2) & plane.across.inside(left, right).unsqueeze(1)


def paste(x: Tensor, mask: Tensor, content: Tensor) -> Tensor:
    """x (n, C, H, W) with content, of a shape that broadcasts to it, where mask (n, H, W)."""
    return torch.where(mask.unsqueeze(1), content, x)


def blur_matrix(axis: Axis, start: Tensor, stop: Tensor, taps: Tensor) -> Tensor:
    """(n, size, size) Gaussian along an axis that sees pixels from start to before stop (n,) only, reflected at both ends.

    taps: (n, 15) weights. Rows outside of the block mean nothing. One tap at a time: a sum in fixed order repeats on a GPU.
    """
    pixels = torch.arange(axis.size, device=start.device, dtype=start.dtype)
    first, last = start.unsqueeze(-1), (stop - 1).unsqueeze(-1)
    period = 2 * (last - first)
    place = torch.maximum(torch.minimum(pixels, last), first)  # (n, size)
    matrix = torch.zeros(len(start), axis.size, axis.size, device=start.device)
    for tap in range(2 * REACH + 1):
        offset = (place + (tap - REACH) - first).remainder(period.clamp(min=1))
        source = torch.where(period > 0, first + torch.minimum(offset, period - offset), first)
        weight = taps[:, tap].view(-1, 1, 1).expand(-1, axis.size, 1)
        matrix.scatter_add_(2, source.long().unsqueeze(-1), weight)
    return matrix


def blurred(x: Tensor, plane: Plane, uniform: Tensor) -> Tensor:
    """x (n, C, H, W) with one block blurred, each view by its own Gaussian. uniform: (n, 6) block, kernel, sigma.

    The kernel has 2 * (k // 2) + 1 taps, k a whole number from 3 to 15; sigma is 0.1 to 5.1 pixels; weights add up to 1.
    """
    count, channels, height, width = x.shape
    radius, sigma = (integers(uniform[:, ONE], 3, 16) / 2).floor(), uniform[:, ONE + 1] * 5 + 0.1
    distance = torch.arange(-REACH, REACH + 1, device=x.device, dtype=x.dtype)
    taps = torch.exp(-0.5 * (distance / sigma.unsqueeze(-1)).square()) * (distance.abs() <= radius.unsqueeze(-1))
    taps = taps / taps.sum(-1, keepdim=True)
    top, bottom, left, right = plane.drawn(uniform[:, :ONE])
    down, across = blur_matrix(plane.down, top, bottom, taps), blur_matrix(plane.across, left, right, taps)
    middle = torch.bmm(x.reshape(count, channels * height, width), across.transpose(1, 2))
    return torch.matmul(down.unsqueeze(1), middle.view(count, channels, height, width))


def recoloured(x: Tensor, uniform: Tensor) -> Tensor:
    """x (n, C, H, W), each channel times 0.5 to 1.5 and plus -0.5 to 0.5, in normalised units. uniform: (n, 2 C)."""
    gain, shift = uniform.view(len(x), 2, -1, 1, 1).unbind(1)
    return x * (gain + 0.5) + (shift - 0.5)


class _Views:
    """The views of one call, flat, with what the corruptions draw from. clean: (V * B, C, H, W)."""

    def __init__(self, views: Tensor, draw: Draw) -> None:
        self.shape, self.draw, self.device = views.shape, draw, views.device
        self.clean = views.flatten(0, 1)
        first = torch.arange(views.shape[0], device=self.device).unsqueeze(1) * views.shape[1]
        self.partner = (first + draw.partners(self.device)).flatten()  # (V * B,) rows of `clean`
        self.images = torch.empty_like(self.clean, memory_format=torch.contiguous_format)
        self.changed = torch.empty(len(self.clean), *views.shape[-2:], dtype=torch.bool, device=self.device)

    def numbers(self, purpose: str, *shape: int) -> Tensor:
        """(V * B, *shape) uniform numbers of a purpose."""
        uniform = self.draw.uniform(self.shape[0], *shape, purpose=f"corruption: {purpose}")
        return send(uniform.transpose(0, 1).flatten(0, 1), self.device)

    def noise(self) -> Tensor:
        """(3 C H W + 1, C H W) standard normal windows, every one of one field."""
        size = self.clean[0].numel()
        field = torch.randn(4 * size, generator=self.draw.generator("corruption: field"))
        return send(field, self.device).unfold(0, size, 1)

    def parts(self, slots: int) -> list[slice]:
        """Views in pieces that fit the cache on a CPU, or the memory of a GPU. slots: blocks drawn for each."""
        each = self.clean[0].numel() + slots * sum(self.shape[-2:])
        step = max(1, (CPU_CHUNK if self.device.type == "cpu" else DEVICE_CHUNK) // each)
        return [slice(first, min(first + step, len(self.clean))) for first in range(0, len(self.clean), step)]

    def recolour(self, share: float) -> None:
        """Recolours one block of a view with that probability."""
        if share == 0:
            return
        plane = plane_of_one(*self.shape[-2:])
        uniform = self.numbers("colour", 1 + ONE + 2 * self.shape[2])
        for part in self.parts(1):
            mask = mask_of_one(plane, uniform[part, 1 : 1 + ONE]) & (uniform[part, :1, None] < share)
            x = self.images[part]
            self.images[part] = paste(x, mask, recoloured(x, uniform[part, 1 + ONE :]))
            self.changed[part] |= mask

    def result(self) -> Corrupted:
        """In the shapes of the views."""
        return Corrupted(self.images.view(self.shape), self.changed.view(*self.shape[:2], *self.shape[-2:]), None)


def _blocks(cfg: SiTConfig, views: _Views) -> Corrupted:
    """Version 1: grey, blur, noise, another image."""
    height, width = size = views.shape[-2:]
    one, many = plane_of_one(*size), plane_of_many(*size, tuple(cfg.block_side))
    areas = [share * height * width for share in (cfg.drop_area, cfg.replace_area)]
    slots = [slots_of_sum(many, area) for area in areas]
    grey, blur = views.numbers("grey", ONE), views.numbers("blur", BLUR)
    budgets, place = views.numbers("area", 2), views.numbers("window")
    noise, other = (views.numbers(name, count, ONE) for name, count in zip(("noise", "other"), slots, strict=True))
    windows = views.noise()
    place = integers(place, 0, len(windows)).long()
    for part in views.parts(max(slots)):
        x = views.clean[part]
        masks = [mask_of_one(one, grey[part]), mask_of_one(one, blur[part, :ONE]),
                 mask_of_sum(many, noise[part], budgets[part, 0] * areas[0]),
                 mask_of_sum(many, other[part], budgets[part, 1] * areas[1])]
        x = paste(x, masks[0], x.mean(1, keepdim=True))
        x = paste(x, masks[1], blurred(x, one, blur[part]))
        x = paste(x, masks[2], windows[place[part]].view_as(x))
        views.images[part] = paste(x, masks[3], views.clean[views.partner[part]])
        views.changed[part] = masks[0] | masks[1] | masks[2] | masks[3]
    views.recolour(cfg.colour)
    return views.result()


def _gmml(cfg: SiTConfig, views: _Views) -> Corrupted:
    """Version 3: dropped blocks; or, with probability 1 / (kinds of dropping + 1), another image's instead."""
    height, width = views.shape[-2:]
    plane = plane_of_gmml(height, width, cfg.align)
    drops = len(cfg.drop_type) if cfg.drop_area else 0
    slots = slots_of_union(plane, max(cfg.drop_area, cfg.replace_area) * height * width)
    uniform, choice, place = views.numbers("blocks", slots, ONE), views.numbers("choice", 3), views.numbers("window")
    replaced = choice[:, 0] < (1 / (drops + 1) if cfg.replace_area else 0)
    noisy = torch.zeros_like(replaced)
    for index, kind in enumerate(cfg.drop_type):
        if kind == "noise":
            noisy |= integers(choice[:, 1], 0, len(cfg.drop_type)) == index
    least, most = (torch.where(replaced, min(least, cfg.replace_area), min(least, cfg.drop_area)) for least in (0.5, 1.0))
    budget = (least + choice[:, 2] * (most - least)) * height * width
    windows = views.noise()
    place = integers(place, 0, len(windows)).long()
    for part in views.parts(slots):
        x = views.clean[part]
        mask = mask_of_union(plane, uniform[part], budget[part])
        dropped = windows[place[part]].view_as(x) * noisy[part].view(-1, 1, 1, 1)
        content = torch.where(replaced[part].view(-1, 1, 1, 1), views.clean[views.partner[part]], dropped)
        views.images[part] = paste(x, mask, content)
        views.changed[part] = mask
    views.recolour(cfg.colour)
    return views.result()


def _mask(cfg: SiTConfig, views: Tensor, draw: Draw, patch_size: int) -> Corrupted:
    """Exactly round(mask_ratio * N) patches, at least one; of `80/10/10` each by a draw of its own."""
    flat = _Views(views, draw)
    height, width = views.shape[-2:]
    rows, columns = height // patch_size, width // patch_size
    patches = rows * columns
    chosen = flat.numbers("patches", patches).argsort(dim=-1, stable=True)[:, : max(1, round(cfg.mask_ratio * patches))]
    mask = torch.zeros(len(chosen), patches, dtype=torch.bool, device=views.device).scatter_(1, chosen, True)

    def pixels(patch: Tensor) -> Tensor:
        grid = patch.view(-1, rows, 1, columns, 1).expand(-1, rows, patch_size, columns, patch_size)
        return grid.reshape(-1, height, width)

    images, hidden = views, mask
    if cfg.mask_rule == "80/10/10":
        share = flat.numbers("rule", patches)
        hidden, other = mask & (share < 0.8), mask & (share >= 0.8) & (share < 0.9)
        images = paste(flat.clean, pixels(other), flat.clean[flat.partner]).view(views.shape)
    return Corrupted(images, pixels(mask).view(*views.shape[:2], height, width), hidden.view(*views.shape[:2], patches))


def validate_corruption(cfg: SiTConfig, height: int, width: int, patch_size: int) -> None:
    """Raises UserError that names the setting that cannot be, for views of height x width pixels."""
    side = min(height, width)
    if cfg.corruption == "blocks" and cfg.block_side[0] > cfg.block_side[1]:
        raise UserError(f"method.block_side: expected [least, most], least first; got {cfg.block_side}.")
    if cfg.corruption == "mask" and (height % patch_size or width % patch_size):
        raise UserError(f"method.corruption: mask hides whole patches, but {height}x{width} is not divisible by {patch_size}.")
    if cfg.corruption != "gmml":
        return
    if cfg.align > int(GMML_SIDE * side):
        raise UserError(f"method.align: expected at most {int(GMML_SIDE * side)}, 30% of a view of {side} pixels, got {cfg.align}.")
    reached = (plane_of_gmml(height, width, cfg.align).covered() > 0).double().mean().item()
    for key in ("drop_area", "replace_area"):
        if getattr(cfg, key) > reached:
            raise UserError(f"method.{key}: blocks of method.align {cfg.align} reach {reached:.0%} of a view of {height}x{width} pixels, "
                            f"not {getattr(cfg, key):.0%}.")


def corrupt(cfg: SiTConfig, views: Tensor, draw: Draw, patch_size: int) -> Corrupted:
    """Corrupted copies of normalised fp32 views (V, B, C, H, W), every view by draws of its own, on the views' device.

    draw: rows of the global batch that the B images are. patch_size: side of a patch in pixels (`mask` only).
    """
    if draw.rows.stop - draw.rows.start != views.shape[1]:
        raise ValueError(f"rows {draw.rows} do not select {views.shape[1]} images")
    height, width = views.shape[-2:]
    validate_corruption(cfg, height, width, patch_size)
    if cfg.corruption == "none":
        return Corrupted(views, torch.zeros(*views.shape[:2], height, width, dtype=torch.bool, device=views.device), None)
    with full_precision(views.device):
        if cfg.corruption == "mask":
            return _mask(cfg, views, draw, patch_size)
        return (_blocks if cfg.corruption == "blocks" else _gmml)(cfg, _Views(views, draw))
