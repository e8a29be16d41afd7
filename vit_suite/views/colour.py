"""Colour augmentation of a batch, every sample with its own factors: jitter, greyscale, Gaussian blur, solarisation.

Semantics are torchvision's on float images (transforms.v2.functional), values in 0..1 and clamped after every step; jitter runs its
four steps in a random order per sample, as ColorJitter does per call. All operations work in place on x (N, C, H, W), contiguous fp32.

Which samples an operation touches is known on the host, where the parameters are drawn, so rows are gathered by index lists
built there: a GPU never has to tell the host how many samples were chosen.

Channels: brightness and contrast work on any number (contrast pulls towards the mean grey for RGB, towards the mean of all channels
otherwise). Saturation, hue and greyscale are defined for RGB only and leave other images as they are, as torchvision does for
one channel.

Axes: N samples, C channels, P pixels of a plane.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.views.resample import send

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey (torchvision; ITU-R BT.601)."""
CPU_CHUNK = 1 << 18
"""Elements worked on at a time on a CPU: 1 MiB, so that the dozens of passes over a chunk stay in a core's L2 cache."""
HUE_SPAN = 1 << 14
"""Pixels whose hue is turned at a time on a CPU: about 12 temporaries of 64 KiB."""
BLUR_TAPS_SIDE = 40
"""Side above which a CPU blurs by shifted sums: a 224 view takes 0.7 ms with 7 taps a side, 1.7 ms by products."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Columns of the jitter factors, and the numbers in its orders."""


def grey_plane(x: Tensor) -> Tensor:
    """(N, 1, P) grey of RGB (N, 3, P)."""
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def brightness_(x: Tensor, factor: Tensor) -> Tensor:
    """x (N, C, P) times factor (N,)."""
    return x.mul_(factor.view(-1, 1, 1)).clamp_(0, 1)


def contrast_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend of x (N, C, P) with its mean grey: factor 0 is flat, 1 the image."""
    mean = x.mean(-1)  # (N, C)
    level = (mean @ x.new_tensor(LUMA) if x.shape[1] == 3 else mean.mean(1)) * (1 - factor)
    # Two passes with one broadcast operand each: PyTorch's CPU loops do not vectorise addcmul with two, which is 5 times slower.
    return x.mul_(factor.view(-1, 1, 1)).add_(level.view(-1, 1, 1)).clamp_(0, 1)


def saturation_(x: Tensor, factor: Tensor) -> Tensor:
    """Blend of x (N, 3, P) with its grey: factor 0 is grey, 1 the image. Nothing for other channel counts."""
    if x.shape[1] != 3:
        return x
    factor = factor.view(-1, 1, 1)
    grey = grey_plane(x).mul_(1 - factor)
    return x.mul_(factor).add_(grey).clamp_(0, 1)


def hue_(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of x (N, 3, P) by shift (N,) in turns, -0.5..0.5, at constant HSV value and saturation.

    Nothing for other channel counts. A GPU or CPU runs the pixels in spans that keep the dozen temporaries in cache.
    """
    if x.shape[1] == 3:
        span = max(HUE_SPAN // len(x), 1) if x.device.type == "cpu" and len(x) else x.shape[-1]
        for part in x.split(span, -1):
            _turn_hue_(part, shift.view(-1, 1))
    return x


def _turn_hue_(x: Tensor, shift: Tensor) -> None:
    """HSV and back without its six sectors: on a CPU a `where` costs as much as ten arithmetic passes.

    With u = (rgb - min) / chroma, one of u is 0 and one is 1, and hue in sixths of a turn, -3..3, has the sign of s = u_g - u_b and
    the magnitude 1.5 + (|s| - 1.5) (2 u_r - 1), which is bilinear and right on all three of its sectors (u_r = 1, |s| = 1, u_r = 0).
    Back: a channel is value - chroma * clip(2 - 6 d, 0, 1), where d is the distance on the circle, in turns, from the hue to the
    channel's opposite (cyan 1/2, magenta -1/6, yellow 1/6).
    """
    red, green, blue = x.unbind(1)  # (N, P)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    side = (green - blue).mul_(inverse)
    hue = torch.sub(red, least, out=least).mul_(inverse).mul_(2).sub_(1)
    hue.mul_(torch.abs(side, out=inverse).sub_(1.5)).add_(1.5).copysign_(side).mul_(1 / 6).add_(shift)
    opposite = x.new_tensor([1 / 2, -1 / 6, 1 / 6]).view(1, 3, 1)
    distance = hue.unsqueeze(1) - opposite  # (N, 3, P)
    distance.sub_(distance.round()).abs_().mul_(-6).add_(2).clamp_(0, 1)
    torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), distance, value=-1, out=x)


JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness_, contrast_, saturation_, hue_)


def _steps(order: Tensor, apply: Tensor, merge: bool) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Which rows take which operations in turn. order (N, 4), apply (N,) bool, both on the CPU.

    `merge` False (CPU): rows of one order go through all four steps while they are in the cache: at most 24 groups.
    `merge` True (GPU): round by round, rows that take the same operation together: 16 larger groups and so fewer kernels.
    """
    rows = apply.nonzero().squeeze(1)
    order = order.index_select(0, rows)
    if merge:
        for column in order.unbind(1):
            for operation in range(4):
                yield rows[column == operation], (operation,)
        return
    code = order @ torch.tensor([64, 16, 4, 1])
    sorting = code.argsort(stable=True)
    for number, group in zip(*_runs(code[sorting], rows[sorting]), strict=True):
        yield group, tuple(number // base % 4 for base in (64, 16, 4, 1))


def _runs(codes: Tensor, rows: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The distinct values of sorted `codes`, and the rows that belong to each."""
    numbers, counts = torch.unique_consecutive(codes, return_counts=True)
    return numbers.tolist(), rows.split(counts.tolist())


def _blocks(rows: Tensor, each: int, device: torch.device) -> Iterator[Tensor]:
    """`rows` in pieces that fit the cache on a CPU, at once on a GPU; none when it is empty."""
    if len(rows):
        yield from rows.split(max(1, CPU_CHUNK // each) if device.type == "cpu" else len(rows))


def jitter_(x: Tensor, factors: Tensor, order: Tensor, apply: Tensor) -> Tensor:
    """Colour jitter of the samples in `apply`.

    x: (N, C, H, W) in 0..1. factors: (N, 4) brightness, contrast, saturation factors and hue shift in turns. order: (N, 4) the
    operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order they run. apply: (N,) bool. Order and apply are on the CPU.
    """
    flat = x.view(len(x), x.shape[1], -1)
    for rows, operations in _steps(order, apply, merge=x.device.type != "cpu"):
        if x.shape[1] != 3 and set(operations) <= {SATURATION, HUE}:
            continue
        for block in _blocks(rows, flat[0].numel(), x.device):
            where, factor = send(block, x.device), send(factors[block], x.device)
            part = flat.index_select(0, where)
            for operation in operations:
                JITTER[operation](part, factor[:, operation])
            flat.index_copy_(0, where, part)
    return x


def greyscale_(x: Tensor, apply: Tensor) -> Tensor:
    """Grey in all three channels for the samples in `apply` (N,) bool on the CPU; nothing for other channel counts."""
    if x.shape[1] != 3:
        return x
    flat = x.view(len(x), 3, -1)
    for block in _blocks(apply.nonzero().squeeze(1), flat[0].numel(), x.device):
        rows = send(block, x.device)
        flat.index_copy_(0, rows, grey_plane(flat.index_select(0, rows)).expand(-1, 3, -1))
    return x


def solarise_(x: Tensor, apply: Tensor) -> Tensor:
    """Inverts values of one half and above (Pillow: 128 of 255) in the samples of `apply` (N,) bool on the CPU."""
    for block in _blocks(apply.nonzero().squeeze(1), x[0].numel(), x.device):
        rows = send(block, x.device)
        part = x.index_select(0, rows)
        x.index_copy_(0, rows, torch.minimum(part, 1 - part))  # 1 - v is the smaller one exactly from 1/2 on
    return x


@functools.lru_cache(maxsize=16)
def _taps_to_matrix(radius: int, size: int, device: torch.device) -> Tensor:
    """(radius + 1, size * size): how often pixel p is read at distance d for output q, with reflection at the edges (-1 reads 1)."""
    matrix = torch.zeros(radius + 1, size, size)
    for place in range(size):
        for offset in range(-radius, radius + 1):
            matrix[abs(offset), place, _reflect(place + offset, size)] += 1
    return matrix.view(radius + 1, -1).to(device)


def _reflect(place: int, size: int) -> int:
    """The pixel read for `place` off the edge, repeated as often as it takes (a 3 pixel view may be blurred over 7)."""
    period = max(2 * (size - 1), 1)
    place %= period
    return min(place, period - place) if size > 1 else 0


def gaussian_taps(sigma: Tensor, radius: int) -> Tensor:
    """(N, radius + 1) weights at distances 0, 1 .. radius; taps on both sides sum to 1."""
    distance = torch.arange(radius + 1, device=sigma.device, dtype=torch.float32)
    # The floor keeps exp out of subnormal numbers, where a CPU is some 50 times slower; e^-60 is nothing beside 1.
    taps = (distance.square() * (-0.5 / sigma.float().square()).unsqueeze(-1)).clamp_(min=-60).exp_()
    return taps.div_(2 * taps.sum(-1, keepdim=True) - 1)


def blur_radius(sigma: float) -> int:
    """Pixels that a blur reaches: 3.5 sigma, beyond which lie 5e-4 of the Gaussian."""
    return max(1, math.ceil(3.5 * sigma))


def blur_(x: Tensor, sigma: Tensor, apply: Tensor) -> Tensor:
    """Gaussian blur of the samples in `apply` (N,) bool, reflecting at the edges; sigma (N,) in pixels; both on the CPU.

    Small views, and all on a GPU, by two batched products with (S, S) matrices; views above BLUR_TAPS_SIDE on a CPU sample by sample
    as a sum of shifted copies.
    """
    rows = apply.nonzero().squeeze(1)
    if not len(rows):
        return x
    if x.device.type == "cpu" and min(x.shape[-2:]) > BLUR_TAPS_SIDE:
        for index, spread in zip(rows.tolist(), sigma[rows].tolist(), strict=True):
            _blur_by_taps(x[index], spread)
        return x
    radius = blur_radius(float(sigma.max()))
    height, width = x.shape[-2:]
    for block in _blocks(rows, x[0].numel() + height * height + width * width, x.device):
        where, spread = send(block, x.device), send(sigma[block], x.device)
        x.index_copy_(0, where, _blur_by_matrix(x.index_select(0, where), gaussian_taps(spread, radius)))
    return x


def _blur_by_matrix(x: Tensor, taps: Tensor) -> Tensor:
    """Blurred x (n, C, H, W), taps (n, radius + 1)."""
    count, channels, height, width = x.shape
    radius = taps.shape[1] - 1
    with torch.autocast(x.device.type, enabled=False):
        across = (taps @ _taps_to_matrix(radius, width, x.device)).view(count, width, width)
        down = across if height == width else (taps @ _taps_to_matrix(radius, height, x.device)).view(count, height, height)
        middle = torch.bmm(x.reshape(count, channels * height, width), across.transpose(1, 2))
        return torch.matmul(down.unsqueeze(1), middle.view(count, channels, height, width))


def _blur_by_taps(x: Tensor, sigma: float) -> None:
    """Blurs x (C, H, W) in place, plane by plane, so that a plane stays in cache through all its taps."""
    height, width = x.shape[-2:]
    radius = min(blur_radius(sigma), height - 1, width - 1)
    taps = gaussian_taps(torch.tensor([sigma]), radius)[0].tolist()
    for plane in x:
        padded = functional.pad(plane[None], (radius, radius, 0, 0), mode="reflect")[0]
        across = padded[:, radius : radius + width] * taps[0]
        for distance, weight in enumerate(taps[1:], start=1):
            across.add_(padded[:, radius - distance : radius - distance + width], alpha=weight)
            across.add_(padded[:, radius + distance : radius + distance + width], alpha=weight)
        padded = functional.pad(across[None, None], (0, 0, radius, radius), mode="reflect")[0, 0]
        torch.mul(padded[radius : radius + height], taps[0], out=plane)
        for distance, weight in enumerate(taps[1:], start=1):
            plane.add_(padded[radius - distance : radius - distance + height], alpha=weight)
            plane.add_(padded[radius + distance : radius + distance + height], alpha=weight)
