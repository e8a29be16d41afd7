"""SiT's corruptions of normalized views, in batches. The network sees the corrupted view and reconstructs the clean
one.

- `blocks`, version 1 (Atito, Awais, Kittler 2021, arXiv 2104.03602, code of July 2021): one after the other a gray
  block, a blurred block, blocks of noise, and blocks of another image.
- `gmml`, version 3 (group masked model learning): blocks become noise or zero, or else those of another image.
- `mask`: a mask token replaces whole patches (BERT).

Views are normalized, so zero is the mean color.

Deviations from the authors' code:
- The other image is the CLEAN view of the partner. There it is the view that the loop over the batch has left in that
  place so far.
- The blur of a block that is smaller than its kernel reflects several times. There it fails.
- `replace_area` 0 replaces nothing and `drop_area` 0 drops nothing; `gmml` then does the other to every view.
- Blocks are chosen among a fixed number of drawn ones (blocks.py); there they are drawn until the area is reached.
- Noise is a window, at a random place, of one field a step of four views' length: cheap, and the same on every number
  of ranks.
- `color`, off by default, is not in their code.

Axes: V views, B images, n <= V * B of them at a time, C channels, H x W pixels, M slots, N patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.config.limits import pair
from vit_suite.config.sit import SiTConfig
from vit_suite.errors import UserError
from vit_suite.hardware import full_precision, send
from vit_suite.views.blocks import (
    GMML_SIDE,
    Axis,
    Plane,
    integers,
    mask_of_one,
    mask_of_sum,
    mask_of_union,
    plane_of_gmml,
    plane_of_many,
    plane_of_one,
    reached,
    slots_of_sum,
    slots_of_union,
)
from vit_suite.views.draw import Draw

CPU_CHUNK = 1 << 20
"""Numbers of views and blocks worked on at a time on a CPU (4 MiB of fp32). Views/s of 32 px in `blocks` and in `gmml`,
one core of a busy machine: 3,799 and 6,806 at 2^16; 6,110 and 9,693; 8,660 and 11,815; 11,366 and 14,981; 12,638 and
16,747 at 2^20."""
DEVICE_CHUNK = 1 << 27
"""The same on a GPU (512 MiB), where it only bounds memory."""
REACH = 7
"""Largest radius of a blur, in pixels: kernels of 3 to 15 taps."""
ONE, BLUR = 4, 6
"""Uniform numbers that a block takes (top, height, left, width), and a blurred one (kernel, sigma too)."""


class Corrupted(NamedTuple):
    """Corrupted views, and where they are corrupted."""

    images: Tensor
    """(V, B, C, H, W) fp32; the very views that came in where no pixel is touched (`none`, `mask` with `token`)."""
    changed: Tensor
    """(V, B, H, W) bool, pixels that the reconstruction of corrupted pixels counts."""
    hidden: Tensor | None
    """(V, B, N) bool, patches in raster order that the network replaces by its mask token; None unless `mask`."""


def paste(x: Tensor, mask: Tensor, content: Tensor) -> Tensor:
    """x (n, C, H, W) with content, of a shape that broadcasts to it, where mask (n, H, W)."""
    return torch.where(mask.unsqueeze(1), content, x)


def blur_matrix(axis: Axis, start: Tensor, stop: Tensor, taps: Tensor) -> Tensor:
    """(n, size, size) Gaussian along an axis over the pixels from start to before stop (n,), reflected at both ends.

    taps: (n, 15) weights. Rows outside of the block are not used. Taps are added one by one, so that the order of the
    sum, and with it the result, is the same each time on a GPU.
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

    The kernel has 2 * (k // 2) + 1 taps, k a whole number from 3 to 15; sigma is 0.1 to 5.1 pixels; weights add up to
    1.
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


def recolored(x: Tensor, uniform: Tensor) -> Tensor:
    """x (n, C, H, W) with each channel times 0.5 to 1.5, plus -0.5 to 0.5 in normalized units. uniform: (n, 2 C)."""
    gain, shift = uniform.view(len(x), 2, -1, 1, 1).unbind(1)
    return x * (gain + 0.5) + (shift - 0.5)


class _Views:
    """The views of one call in one axis, and the random numbers of the corruptions. clean: (V * B, C, H, W)."""

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
        """(3 C H W + 1, C H W) windows, all of one field of standard normal numbers."""
        size = self.clean[0].numel()
        field = torch.randn(4 * size, generator=self.draw.generator("corruption: field"))
        return send(field, self.device).unfold(0, size, 1)

    def parts(self, slots: int) -> list[slice]:
        """Views in pieces that fit the cache on a CPU, or the memory of a GPU. slots: blocks drawn for each."""
        each = self.clean[0].numel() + slots * sum(self.shape[-2:])
        step = max(1, (CPU_CHUNK if self.device.type == "cpu" else DEVICE_CHUNK) // each)
        return [slice(first, min(first + step, len(self.clean))) for first in range(0, len(self.clean), step)]

    def recolor(self, share: float) -> None:
        """Recolor a block of each view with probability `share`."""
        if share == 0:
            return
        plane = plane_of_one(*self.shape[-2:])
        uniform = self.numbers("color", 1 + ONE + 2 * self.shape[2])
        for part in self.parts(1):
            mask = mask_of_one(plane, uniform[part, 1 : 1 + ONE]) & (uniform[part, :1, None] < share)
            x = self.images[part]
            self.images[part] = paste(x, mask, recolored(x, uniform[part, 1 + ONE :]))
            self.changed[part] |= mask

    def result(self) -> Corrupted:
        """The result, in the shapes of the views."""
        return Corrupted(self.images.view(self.shape), self.changed.view(*self.shape[:2], *self.shape[-2:]), None)


def _blocks(cfg: SiTConfig, clean: Tensor, draw: Draw, patch: tuple[int, int]) -> Corrupted:
    """Version 1: gray, blur, noise, another image."""
    views = _Views(clean, draw)
    height, width = views.shape[-2:]
    one, many = plane_of_one(height, width), plane_of_many(height, width, (cfg.block_side[0], cfg.block_side[1]))
    areas = [share * height * width for share in (cfg.drop_area, cfg.replace_area)]
    slots = [slots_of_sum(many, area) for area in areas]
    gray, blur = views.numbers("gray", ONE), views.numbers("blur", BLUR)
    budgets, place = views.numbers("area", 2), views.numbers("window")
    noise, other = (views.numbers(name, count, ONE) for name, count in zip(("noise", "other"), slots, strict=True))
    windows = views.noise()
    place = integers(place, 0, len(windows)).long()
    for part in views.parts(max(slots)):
        x = views.clean[part]
        masks = [
            mask_of_one(one, gray[part]),
            mask_of_one(one, blur[part, :ONE]),
            mask_of_sum(many, noise[part], budgets[part, 0] * areas[0]),
            mask_of_sum(many, other[part], budgets[part, 1] * areas[1]),
        ]
        x = paste(x, masks[0], x.mean(1, keepdim=True))
        x = paste(x, masks[1], blurred(x, one, blur[part]))
        x = paste(x, masks[2], windows[place[part]].view_as(x))
        views.images[part] = paste(x, masks[3], views.clean[views.partner[part]])
        views.changed[part] = masks[0] | masks[1] | masks[2] | masks[3]
    views.recolor(cfg.color)
    return views.result()


def _gmml(cfg: SiTConfig, clean: Tensor, draw: Draw, patch: tuple[int, int]) -> Corrupted:
    """Version 3: dropped blocks; or, with probability 1 / (kinds of dropping + 1), another image's instead."""
    views = _Views(clean, draw)
    height, width = views.shape[-2:]
    plane = plane_of_gmml(height, width, cfg.align)
    drops = len(cfg.drop_type) if cfg.drop_area else 0
    slots = slots_of_union(plane, max(cfg.drop_area, cfg.replace_area) * height * width)
    uniform, choice = views.numbers("blocks", slots, ONE), views.numbers("choice", 3)
    replaced = choice[:, 0] < (1 / (drops + 1) if cfg.replace_area else 0)
    noisy = torch.zeros_like(replaced)
    for index, kind in enumerate(cfg.drop_type):
        if kind == "noise":
            noisy |= integers(choice[:, 1], 0, len(cfg.drop_type)) == index
    least, most = (
        torch.where(replaced, min(least, cfg.replace_area), min(least, cfg.drop_area)) for least in (0.5, 1.0)
    )
    budget = (least + choice[:, 2] * (most - least)) * height * width
    windows: Tensor | None = None
    if drops and "noise" in cfg.drop_type:  # not drawn for zeros alone; other numbers have purposes of their own
        windows = views.noise()
        place = integers(views.numbers("window"), 0, len(windows)).long()
    for part in views.parts(slots):
        x = views.clean[part]
        mask = mask_of_union(plane, uniform[part], budget[part])
        dropped = torch.zeros_like(x)
        if windows is not None:
            dropped = windows[place[part]].view_as(x) * noisy[part].view(-1, 1, 1, 1)
        content = torch.where(replaced[part].view(-1, 1, 1, 1), views.clean[views.partner[part]], dropped)
        views.images[part] = paste(x, mask, content)
        views.changed[part] = mask
    views.recolor(cfg.color)
    return views.result()


def _none(cfg: SiTConfig, views: Tensor, draw: Draw, patch: tuple[int, int]) -> Corrupted:
    """The views as they are."""
    untouched = torch.zeros(*views.shape[:2], *views.shape[-2:], dtype=torch.bool, device=views.device)
    return Corrupted(views, untouched, None)


def _mask(cfg: SiTConfig, views: Tensor, draw: Draw, patch: tuple[int, int]) -> Corrupted:
    """Mask exactly round(mask_ratio * N) patches. With `80/10/10` each has a draw of its own."""
    flat = _Views(views, draw)
    height, width = views.shape[-2:]
    rows, columns = height // patch[0], width // patch[1]
    patches = rows * columns
    chosen = flat.numbers("patches", patches).argsort(dim=-1, stable=True)[:, : round(cfg.mask_ratio * patches)]
    mask = torch.zeros(len(chosen), patches, dtype=torch.bool, device=views.device).scatter_(1, chosen, True)

    def pixels(chosen: Tensor) -> Tensor:
        grid = chosen.view(-1, rows, 1, columns, 1).expand(-1, rows, patch[0], columns, patch[1])
        return grid.reshape(-1, height, width)

    images, hidden = views, mask
    if cfg.mask_rule == "80/10/10":
        share = flat.numbers("rule", patches)
        hidden, other = mask & (share < 0.8), mask & (share >= 0.8) & (share < 0.9)
        images = paste(flat.clean, pixels(other), flat.clean[flat.partner]).view(views.shape)
    return Corrupted(images, pixels(mask).view(*views.shape[:2], height, width), hidden.view(*views.shape[:2], patches))


def _check_blocks(cfg: SiTConfig, height: int, width: int, patch: tuple[int, int]) -> None:
    if not 0 < cfg.block_side[0] <= cfg.block_side[1]:
        raise UserError(f"method.block_side: expected [least, most], least first, above 0; got {cfg.block_side}.")


def _check_gmml(cfg: SiTConfig, height: int, width: int, patch: tuple[int, int]) -> None:
    side = min(height, width)
    if cfg.align > int(GMML_SIDE * side):
        raise UserError(
            f"method.align: expected at most {int(GMML_SIDE * side)}, 30% of a view of {side} pixels, got {cfg.align}."
        )
    most = reached(plane_of_gmml(height, width, cfg.align))
    for key in ("drop_area", "replace_area"):
        if getattr(cfg, key) > most:
            raise UserError(
                f"method.{key}: blocks of method.align {cfg.align} reach {most:.0%} of a view of {height}x{width}"
                f" pixels, not {getattr(cfg, key):.0%}."
            )


def _check_mask(cfg: SiTConfig, height: int, width: int, patch: tuple[int, int]) -> None:
    if height % patch[0] or width % patch[1]:
        named = str(patch[0]) if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}"
        raise UserError(
            f"method.corruption: mask hides whole patches, but {height}x{width} is not divisible by {named}."
        )
    patches = (height // patch[0]) * (width // patch[1])
    if not 0 < round(cfg.mask_ratio * patches) < patches:
        raise UserError(
            f"method.mask_ratio: {cfg.mask_ratio:g} of {patches} patches hides"
            f" {'none' if cfg.mask_ratio < 0.5 else 'all'} of them; choose a ratio that hides some."
        )


class Corruption(NamedTuple):
    """A way to corrupt views."""

    apply: Callable[[SiTConfig, Tensor, Draw, tuple[int, int]], Corrupted]
    """(options, normalized views (V, B, C, H, W), draw, sides of a patch) -> corrupted views."""
    check: Callable[[SiTConfig, int, int, tuple[int, int]], None] | None = None
    """(options, height and width of a view, sides of a patch): raises UserError for an option that cannot be."""


CORRUPTIONS: dict[str, Corruption] = {
    "none": Corruption(_none),
    "blocks": Corruption(_blocks, _check_blocks),
    "gmml": Corruption(_gmml, _check_gmml),
    "mask": Corruption(_mask, _check_mask),
}
"""Value of `method.corruption` -> what it does. A new one is its functions, one row here, and its word in SiTConfig."""


def validate_corruption(cfg: SiTConfig, height: int, width: int, patch_size: int | tuple[int, int]) -> None:
    """Raises UserError that names the option that cannot be, for views of height x width pixels."""
    if check := CORRUPTIONS[cfg.corruption].check:
        check(cfg, height, width, pair(patch_size))


def corrupt(cfg: SiTConfig, views: Tensor, draw: Draw, patch_size: int | tuple[int, int]) -> Corrupted:
    """Corrupted copies of normalized fp32 views (V, B, C, H, W), every view by draws of its own, on the views' device.

    draw: rows of the global batch that the B images are. patch_size: side of a patch in pixels, or (height, width); for
    `mask` only.
    """
    if draw.rows.stop - draw.rows.start != views.shape[1]:
        raise ValueError(f"rows {draw.rows} do not select {views.shape[1]} images")
    height, width = views.shape[-2:]
    validate_corruption(cfg, height, width, patch_size)
    with full_precision(views.device):
        return CORRUPTIONS[cfg.corruption].apply(cfg, views, draw, pair(patch_size))
