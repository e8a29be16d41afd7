"""Crops of all sizes of a batch by a few large operators: what a GPU runs in place of `resample.py`'s loops.

A GPU finishes a small operator sooner than Python launches the next one. So nothing here loops over images or views:
one gather pads the images of a bucket, one product resizes the columns of all their views, and one for each size of
views resizes the rows. The weights are those of `resample.py`. Each output pixel has few taps, so the weights are
computed for these alone, and then written into zeros.

On CUDA the products run in TF32, which rounds a weight to 11 bits. A pixel moves by at most 0.25 / 255 (tested by
emulation), where the tolerance of a resize is 2 / 255.

Axes: B images, n images of a bucket, V views of one size, C channels, H x W pixels of a padded image, h x w of a view,
R rows of the weights (the columns, then the lines of all views of an image), K taps of a row, M pixels of all views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.data.packed import packed
from vit_suite.hardware import full_precision, send, tf32_products
from vit_suite.views.kernels import RADIUS, Kernel, kernel_, stretch_of

CHUNK = 1 << 30
"""Numbers of weights and intermediates that may be in memory at a time (4 GiB of fp32)."""
BUCKET = 128
"""Images of different sizes are padded to multiples of this side."""
MOST_BUCKETS = 4
"""Padded sizes of a batch at most: each takes about 15 launches."""


class Group(NamedTuple):
    """Views of one size."""

    boxes: Tensor
    """(B, V, 4) top, left, height, width in pixels; on the CPU."""
    flip: Tensor | None
    """(B, V) bool, on the CPU."""
    size: tuple[int, int]
    """h, w."""

    @property
    def views(self) -> int:
        """V."""
        return self.boxes.shape[1]


class Planes:
    """Views of several sizes in one buffer (C, M), channel by channel: group, view, image, row, column.

    Each operation on colors then takes one launch for the views of all sizes.
    """

    def __init__(self, groups: Sequence[Group], channels: int, device: torch.device) -> None:
        self.shapes = [(group.views, len(group.boxes), *group.size) for group in groups]
        self.pixels = torch.empty(channels, sum(map(math.prod, self.shapes)), device=device)

    @classmethod
    def of(cls, x: Tensor) -> Planes:
        """A copy of views x (B, C, h, w) of one size, as one view of B images."""
        count, channels, height, width = x.shape
        no_boxes = torch.empty(count, 1, 4)
        planes = cls([Group(no_boxes, None, (height, width))], channels, x.device)
        next(planes.groups()).copy_(x.transpose(0, 1).unsqueeze(1))
        return planes

    def groups(self) -> Iterator[Tensor]:
        """The views of each size, (C, V, B, h, w), in the memory of the buffer."""
        start = 0
        for shape in self.shapes:
            count = math.prod(shape)
            yield self.pixels[:, start : start + count].unflatten(1, shape)
            start += count

    def rows(self) -> list[tuple[int, int]]:
        """(number of views, pixels of a view) for each size."""
        return [(views * images, height * width) for views, images, height, width in self.shapes]


@functools.lru_cache(maxsize=256)
def _counting(count: int, device: torch.device) -> Tensor:
    """0, 1 .. count - 1, kept on the device."""
    return send(torch.arange(count), device)


@functools.lru_cache(maxsize=16)
def _layout(sizes: tuple[tuple[int, tuple[int, int]], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of the weights: its column of `_table` (R,), its pixel of the view (R,), and how much its weights
    are to sum to, over 1: (R, 1). sizes: (V, (h, w)) of each group."""
    outs = [size[axis] for axis in (1, 0) for views, size in sizes for _ in range(views)]
    columns = torch.repeat_interleave(torch.arange(len(outs)), torch.tensor(outs))
    places = torch.cat([torch.arange(out) + 0.5 for out in outs])
    levels = torch.where(columns < len(outs) // 2, 255.0, 1.0).unsqueeze(1)  # columns: uint8 becomes 0..1
    return send(columns, device), send(places, device), send(levels, device)


def _table(groups: Sequence[Group], kernel: Kernel) -> Tensor:
    """(B, 2 V, 6) numbers of the resize of each view along its columns, then its lines; V of all groups. In pixels of
    the image: place of the view's edge less 1/2, step of a pixel of the view, 1 / stretch of the kernel, its radius,
    and the first pixel of the box and the one after its last."""
    found = []
    for axis in (1, 0):
        for group in groups:
            start, length = group.boxes[..., axis].double(), group.boxes[..., 2 + axis].double()
            step = length / group.size[axis]
            stretch = stretch_of(step, kernel)
            edge = start
            if axis and group.flip is not None:
                edge = torch.where(group.flip, start + length, start)
                step = torch.where(group.flip, -step, step)
            bounds = start.floor(), (start + length).ceil()
            found.append(torch.stack([edge - 0.5, step, 1 / stretch, RADIUS[kernel] * stretch, *bounds], -1))
    return torch.cat(found, 1).float()


def _weights(
    table: Tensor, layout: tuple[Tensor, Tensor, Tensor], last: Tensor, taps: int, uint8: bool, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """The pixels of the image that each row reads, (B, R, K) int64, and their weights.

    table: (B, 2 V, 6). last: (B, 1) the last pixel at which K taps may start.
    """
    columns, places, levels = layout
    edge, step, inverse, radius, low, high = table.index_select(1, columns).unsqueeze(2).unbind(-1)  # (B, R, 1)
    center = torch.addcmul(edge, step, places.unsqueeze(1))
    first = (center - radius).floor_().clamp_(low, last.unsqueeze(-1))  # `last` wins: then all of the image is read
    pixels = first + _counting(taps, first.device)  # (B, R, K)
    weights = kernel_((pixels - center).mul_(inverse), kernel)
    weights.mul_((pixels >= low) & (pixels < high))
    total = weights.sum(-1, keepdim=True)
    return pixels.long(), weights.div_(total.mul_(levels) if uint8 else total)


def _buckets(sizes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Padded size -> the images of it: multiples of `BUCKET`, merged where that pads least until few are left."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(sizes):
        found.setdefault((-(-height // BUCKET) * BUCKET, -(-width // BUCKET) * BUCKET), []).append(index)
    while len(found) > MOST_BUCKETS:
        keys = list(found)
        pairs = [(one, other) for place, one in enumerate(keys) for other in keys[place + 1 :]]
        one, other = min(pairs, key=lambda pair: _padding(pair[0], pair[1], len(found[pair[0]]), len(found[pair[1]])))
        members = found.pop(one) + found.pop(other)
        found.setdefault(_both(one, other), []).extend(members)
    return found


def _both(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(one[0], other[0]), max(one[1], other[1])


def _padding(one: tuple[int, int], other: tuple[int, int], ones: int, others: int) -> int:
    """Pixels that are added where images of two padded sizes get one."""
    return (ones + others) * math.prod(_both(one, other)) - ones * math.prod(one) - others * math.prod(other)


class _Source:
    """The images of a batch or a list, bucket by bucket, padded to one size."""

    def __init__(self, images: Tensor | Sequence[Tensor], device: torch.device) -> None:
        self.images, self.device, self.channels = images, device, images[0].shape[0]
        self.uint8 = images[0].dtype == torch.uint8
        if isinstance(images, Tensor):
            self.buckets = {(images.shape[2], images.shape[3]): list(range(len(images)))}
            return
        sizes = torch.tensor([image.shape[-2:] for image in images])  # (B, 2)
        self.buckets = _buckets([(int(height), int(width)) for height, width in sizes])
        height, width = (max(side) for side in zip(*self.buckets, strict=True))
        areas = sizes.prod(1)
        starts = (areas.cumsum(0) - areas) * self.channels
        numbers = torch.stack([starts, sizes[:, 1], sizes[:, 0] - 1, areas], 1)[self.order]
        starts, widths, lasts, areas = send(numbers, device).unsqueeze(2).unbind(1)  # (B, 1)
        lines = torch.minimum(_counting(height, device), lasts)  # (B, H): below the image its last row
        starts = torch.addcmul(starts, lines, widths).unsqueeze(2)
        planes = _counting(self.channels, device)
        self.starts = torch.addcmul(starts, planes, areas.unsqueeze(2))  # (B, H, C): where a row of pixels starts
        self.pixels = packed(images, slack=width).pixels

    @property
    def order(self) -> list[int]:
        """The images, bucket by bucket."""
        return [index for members in self.buckets.values() for index in members]

    def padded(self, part: slice, size: tuple[int, int]) -> Tensor:
        """The images `part` of the order, (n, H * C, W) fp32. Right of an image are pixels of others, of weight 0."""
        height, width = size
        if isinstance(self.images, Tensor):
            pixels = self.images[part].permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)
        else:
            starts = self.starts[part, :height].flatten()
            pixels = self.pixels.unfold(0, width, 1).index_select(0, starts).float()
        return pixels.reshape(-1, height * self.channels, width)


def crop_planes(images: Tensor | Sequence[Tensor], groups: Sequence[Group], kernel: Kernel = "bicubic") -> Planes:
    """The crops of all groups, resized (antialiased) and mirrored, fp32 in 0..1 on the images' device.

    images: uint8, or float in 0..1, (B, C, H, W), or a list of (C, H_i, W_i) of one type.
    """
    device = images[0].device
    source = _Source(images, device)
    planes, order = Planes(groups, source.channels, device), source.order
    table = _table(groups, kernel)[order]
    taps = math.ceil(2 * float(table[..., 3].max())) + 2
    sides = [max(*size, taps) for size in source.buckets]
    lasts = torch.tensor([side for side, members in zip(sides, source.buckets.values(), strict=True) for _ in members])
    sent = send(torch.cat([table.flatten(1), lasts.unsqueeze(1) - taps], 1), device)
    layout = _layout(tuple((group.views, group.size) for group in groups), device)
    columns = sent[:, :-1].view(table.shape)
    pixels, weights = _weights(columns, layout, sent[:, -1:], taps, source.uint8, kernel)
    rows = send(torch.tensor(order), device) if len(source.buckets) > 1 else None
    begin, across = 0, sum(group.views * group.size[1] for group in groups)
    for (size, members), side in zip(source.buckets.items(), sides, strict=True):
        each = source.channels * size[0] * (size[1] + 2 * across) + 2 * side * weights.shape[1]
        for first in range(begin, begin + len(members), max(1, CHUNK // each)):
            part = slice(first, min(first + max(1, CHUNK // each), begin + len(members)))
            dense = torch.zeros(part.stop - first, weights.shape[1], side, device=device)
            dense.scatter_(2, pixels[part], weights[part])
            _resize(source.padded(part, size), dense, across, planes, part if rows is None else rows[part])
        begin += len(members)
    return planes


def _resize(pixels: Tensor, weights: Tensor, across: int, planes: Planes, rows: slice | Tensor) -> None:
    """Writes the views of the images `rows` into the planes.

    pixels: (n, H * C, W). weights: (n, R, side), of which the first `across` rows resize along the columns.
    """
    count, (channels, _) = len(pixels), planes.pixels.shape
    height, width = pixels.shape[1] // channels, pixels.shape[2]
    with full_precision(pixels.device), tf32_products(pixels.device):
        middle = torch.bmm(pixels, weights[:, :across, :width].transpose(1, 2))  # (n, H * C, columns of all views)
        column, line = 0, across
        for target in planes.groups():
            views, h, w = target.shape[1], target.shape[3], target.shape[4]
            narrow = middle[..., column : column + views * w].view(count, height, channels, views, w)
            clamped = torch.empty(count, views, height, channels, w, device=pixels.device)
            torch.clamp(narrow.permute(0, 3, 1, 2, 4), 0, 1, out=clamped)  # as Pillow, between the passes
            down = weights[:, line : line + views * h, :height].reshape(count * views, h, height)
            found = torch.bmm(down, clamped.view(count * views, height, channels * w))
            found = found.view(count, views, h, channels, w).permute(3, 1, 0, 2, 4)  # (C, V, n, h, w)
            if isinstance(rows, slice):
                torch.clamp(found, 0, 1, out=target[:, :, rows])
            else:
                target.index_copy_(2, rows, found.clamp(0, 1))
            column, line = column + views * w, line + views * h
