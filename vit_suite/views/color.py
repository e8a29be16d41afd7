"""Color augmentation of a batch, every sample with its own factors: jitter, grayscale, Gaussian blur, solarization.

The results are torchvision's on float images (transforms.v2.functional): values in 0..1, clamped after each operation.
Jitter runs its four operations in a random order for each sample, as ColorJitter does for each call. Blur is Pillow's,
which DINO's release uses. All operations work in place on x (N, C, H, W), contiguous fp32.

This is the code for a CPU, which gathers the samples that an operation is for. `planes_color.py` has the same
operations for a GPU.

Channels: brightness, contrast, blur and solarization work on any number. Contrast moves RGB towards its mean gray, and
other images towards the mean of all channels. Saturation, hue and grayscale are defined for RGB only. They leave other
images as they are, as torchvision does for one channel.

Axes: N samples, C channels, P pixels of a plane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.hardware import full_precision, send

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray (torchvision; ITU-R BT.601)."""
CPU_CHUNK = 1 << 18
"""Numbers worked on at a time (1 MiB of fp32). The dozens of passes over a chunk then stay in the cache, and take
longer than the calls. Jitter of 2 x 32 + 8 x 16 took 128, 89, 76, 80, 87 microseconds an image at 2^15, 2^16 .. 2^19.
"""
BLUR_TAPS_SIDE = 88
"""Side up to which views are blurred by products. Microseconds a view by products / by sums of shifted copies, one core
with AVX-512: 32 px 15 / 133, 64 px 75 / 160, 80 px 132 / 181, 96 px 233 / 204, 224 px 2,654 / 890."""
OPPOSITES = (1 / 2, -1 / 6, 1 / 6)
"""Hue, in turns, opposite to red, green and blue: cyan, magenta, yellow."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of the jitter factors, and the numbers in its orders."""


def gray_plane(x: Tensor) -> Tensor:
    """(N, 1, P) gray of RGB (N, 3, P)."""
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """x (N, C, P) times factor (N,)."""
    return x.mul_(factor.view(-1, 1, 1)).clamp_(0, 1)


def contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend of x (N, C, P) with its mean gray: factor 0 is flat, 1 the image."""
    mean = x.mean(-1)  # (N, C)
    level = gray_plane(mean.unsqueeze(-1)).flatten() if x.shape[1] == 3 else mean.mean(1)
    level *= 1 - factor
    # Two passes with one broadcast operand each. PyTorch's CPU loops do not vectorize addcmul with two, and it takes 5
    # times as long.
    return x.mul_(factor.view(-1, 1, 1)).add_(level.view(-1, 1, 1)).clamp_(0, 1)


def saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend of x (N, 3, P) with its gray: factor 0 is gray, 1 the image. Nothing for other channel counts."""
    if x.shape[1] != 3:
        return x
    factor = factor.view(-1, 1, 1)
    gray = gray_plane(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (N, 3, P) by shift (N,) in turns, -0.5..0.5, at constant HSV value and saturation. RGB only.

    This is HSV and back without the six sectors of the usual code, because on a CPU one `where` takes as long as ten
    arithmetic passes. Let u = (rgb - min) / chroma: one of u is 0, and one is 1. The hue in sixths of a turn, -3..3,
    has the sign of s = u_g - u_b and the magnitude 1.5 + (|s| - 1.5) (2 u_r - 1). That is bilinear, and right on each
    of the three sectors u_r = 1, |s| = 1 and u_r = 0. Back to RGB, a channel is value - chroma * clip(2 - 6 d, 0, 1),
    where d is the distance on the circle, in turns, from the hue to the channel's opposite (`OPPOSITES`).
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(1)  # (N, P)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    side = (green - blue).mul_(inverse)
    hue = torch.sub(red, least, out=least).mul_(inverse).mul_(2).sub_(1)
    hue.mul_(torch.abs(side, out=inverse).sub_(1.5)).add_(1.5).copysign_(side).mul_(1 / 6).add_(shift.view(-1, 1))
    distance = torch.empty_like(x)
    for channel, opposite in enumerate(OPPOSITES):
        torch.sub(hue, opposite, out=distance[:, channel])
    distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), distance, value=-1, out=x)


JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness_, contrast_, saturation_, hue_)


def _steps(order: Tensor, apply: Tensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Rows that take the operations in the same order, and that order: at most 24 groups.

    A group goes through all four operations while it is in the cache. order (N, 4), apply (N,) bool, on the CPU.
    """
    rows = apply.nonzero().squeeze(1)
    code = order.index_select(0, rows) @ torch.tensor([64, 16, 4, 1])
    sorting = code.argsort(stable=True)
    for number, group in zip(*_runs(code[sorting], rows[sorting]), strict=True):
        yield group, tuple(number // base % 4 for base in (64, 16, 4, 1))


def _runs(codes: Tensor, rows: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The distinct values of sorted `codes`, and the rows that belong to each."""
    numbers, counts = torch.unique_consecutive(codes, return_counts=True)
    return numbers.tolist(), rows.split(counts.tolist())


def _blocks(rows: Tensor, each: int) -> Iterator[Tensor]:
    """`rows` in pieces that fit the cache; none if it is empty."""
    if len(rows):
        yield from rows.split(max(1, CPU_CHUNK // each))


def jitter_(x: Tensor, factors: Tensor, order: Tensor, apply: Tensor) -> Tensor:
    """Color jitter of the samples in `apply`.

    x: (N, C, H, W) in 0..1. factors: (N, 4) brightness, contrast, saturation factors and hue shift in turns.
    order: (N, 4) the operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order they run. apply: (N,)
    bool.
    """
    flat = x.view(len(x), x.shape[1], -1)
    for rows, operations in _steps(order, apply):
        for block in _blocks(rows, flat[0].numel()):
            part, factor = flat.index_select(0, block), factors[block]
            for operation in operations:
                JITTER[operation](part, factor[:, operation])
            flat.index_copy_(0, block, part)
    return x


def grayscale_(x: Tensor, apply: Tensor) -> Tensor:
    """Gray in all three channels for the samples in `apply` (N,) bool; nothing for other channel counts."""
    if x.shape[1] != 3:
        return x
    flat = x.view(len(x), 3, -1)
    for rows in _blocks(apply.nonzero().squeeze(1), flat[0].numel()):
        flat.index_copy_(0, rows, gray_plane(flat.index_select(0, rows)).expand(-1, 3, -1))
    return x


def solarize_(x: Tensor, apply: Tensor) -> Tensor:
    """Inverts values of one half and above (Pillow: 128 of 255) in the samples of `apply` (N,) bool."""
    for rows in _blocks(apply.nonzero().squeeze(1), x[0].numel()):
        part = x.index_select(0, rows)
        x.index_copy_(0, rows, torch.minimum(part, 1 - part))  # 1 - v is the smaller one exactly from 1/2 on
    return x


@functools.lru_cache(maxsize=16)
def _taps_to_matrix(radius: int, size: int, device: torch.device) -> Tensor:
    """(radius + 1, size * size): how often output q reads pixel p at distance d. Beyond the edge the edge is read."""
    matrix = torch.zeros(radius + 1, size, size)
    for place in range(size):
        for offset in range(-radius, radius + 1):
            matrix[abs(offset), place, min(max(place + offset, 0), size - 1)] += 1
    return send(matrix.view(radius + 1, -1), device)


def box_radius(sigma: Tensor) -> Tensor:
    """Radius (fractional, in pixels) of the box that three times in a row is Pillow's Gaussian of sigma (BoxBlur.c;
    Gwosdek et al. 2011)."""
    variance = sigma.double().square() / 3
    whole = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    return whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))


def box_taps(sigma: Tensor) -> Tensor:
    """(N, reach + 1) weights at distances 0, 1 .. reach of that box for sigma (N,): whole pixels, and a fraction at its
    ends."""
    radius = box_radius(sigma).unsqueeze(-1)
    distance = torch.arange(int(radius.max()) + 2)
    return ((radius + 1 - distance).clamp_(0, 1) / (2 * radius + 1)).float()


def blur_(x: Tensor, sigma: Tensor, apply: Tensor) -> Tensor:
    """Gaussian blur of the samples in `apply` (N,) bool; sigma (N,) in pixels, above 0.

    As Pillow's GaussianBlur, which DINO's release calls: three box blurs, each repeating the edge pixel off the edge.
    They keep the Gaussian's variance even below half a pixel, where a sampled Gaussian hardly blurs (33 / 255 apart at
    sigma 0.3). Small views are blurred by two batched products with (S, S) matrices. Views above BLUR_TAPS_SIDE are
    blurred one by one, as a sum of shifted copies.
    """
    rows = apply.nonzero().squeeze(1)
    if not len(rows):
        return x
    taps = box_taps(sigma[rows])
    height, width = x.shape[-2:]
    if min(height, width) > BLUR_TAPS_SIDE:
        for index, weights in zip(rows.tolist(), taps.tolist(), strict=True):
            _blur_by_taps(x[index], [weight for weight in weights if weight > 0])
        return x
    place = 0
    for block in _blocks(rows, x[0].numel() + height * height + width * width):
        x.index_copy_(0, block, _blur_by_matrix(x.index_select(0, block), taps[place : place + len(block)]))
        place += len(block)
    return x


def box_cubed(taps: Tensor, size: int) -> Tensor:
    """(n, size, size) matrices of three box blurs along an axis."""
    box = (taps @ _taps_to_matrix(taps.shape[1] - 1, size, taps.device)).view(-1, size, size)
    return torch.bmm(torch.bmm(box, box), box)


def _blur_by_matrix(x: Tensor, taps: Tensor) -> Tensor:
    """Blurred x (n, C, H, W), box taps (n, reach + 1)."""
    count, channels, height, width = x.shape
    with full_precision(x.device):
        across = box_cubed(taps, width)
        down = across if height == width else box_cubed(taps, height)
        middle = torch.bmm(x.reshape(count, channels * height, width), across.transpose(1, 2))
        return torch.matmul(down.unsqueeze(1), middle.view(count, channels, height, width))


def _blur_by_taps(x: Tensor, taps: list[float]) -> None:
    """Blurs x (C, H, W) in place as a sum of shifted copies; box taps at distances 0, 1 .."""
    reach = len(taps) - 1
    for axis, pad in ((2, (reach, reach, 0, 0)), (1, (0, 0, reach, reach))):
        size = x.shape[axis]
        for _ in range(3):
            padded = functional.pad(x[None], pad, mode="replicate")[0]
            torch.mul(padded.narrow(axis, reach, size), taps[0], out=x)
            for distance in range(1, reach + 1):
                x.add_(padded.narrow(axis, reach - distance, size), alpha=taps[distance])
                x.add_(padded.narrow(axis, reach + distance, size), alpha=taps[distance])
