"""Color augmentation of views of all sizes together, each with its own factors, by operators over all of them: what a
GPU runs in place of `color.py`, which gathers the views that an operation is for. Values agree to rounding.

A view takes brightness, contrast, saturation and hue in an order of its own. The first three are one operation with
different numbers:

    x = clamp(f x + a gray + c mean gray)        brightness: a = c = 0; saturation: a = 1 - f; contrast: c = 1 - f

A step with f = 1 and a = c = 0 changes nothing. So three steps, the hue of all views, and three more steps hold every
order: a view takes as many of its operations in the first three as it has before its hue.

Views of different sizes are cut into pieces of q pixels, where q divides the pixels of each size. A number that belongs
to a view is copied to its pieces, and then one operator covers the views of all sizes.

Axes: N views, P pieces of q pixels of all of them, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vit_suite.hardware import full_precision, send, tf32_products
from vit_suite.views.color import CONTRAST, HUE, LUMA, OPPOSITES, SATURATION, box_cubed, box_taps
from vit_suite.views.draw import ViewParameters
from vit_suite.views.planes import Planes

BLENDS = 3
"""Brightness, contrast and saturation."""
NEVER = 3.0
"""NEVER - x is larger than each x in 0..1, so the minimum of the two is x."""


class Blend(NamedTuple):
    """One step of a jitter: f, a and c of each view, (N,) on the CPU."""

    factor: Tensor
    gray: Tensor
    mean: Tensor

    def changes(self) -> bool:
        """Whether any view takes this step."""
        return bool((self.factor != 1).any())


def blends_of(drawn: ViewParameters, channels: int) -> tuple[list[Blend], list[Blend]]:
    """The steps before and after the hue. Images without 3 channels have no hue and no saturation."""
    place = (drawn.order == HUE).to(torch.uint8).argmax(1)  # (N,) how many operations come before the hue
    names = drawn.order[drawn.order != HUE].view(-1, BLENDS)
    sides: tuple[list[Blend], list[Blend]] = [], []
    weight = sum(LUMA) if channels == 3 else 1.0
    for step, name in enumerate(names.unbind(1)):
        own = drawn.jitter if channels == 3 else drawn.jitter & (name != SATURATION)
        early = place > step if channels == 3 else torch.ones_like(own)
        for steps, now in zip(sides, (early, ~early), strict=True):
            factor = torch.where(own & now, drawn.factors.gather(1, name.unsqueeze(1))[:, 0], 1.0)
            rest = (1 - factor) * weight
            blend = Blend(factor, torch.where(name == SATURATION, rest, 0), torch.where(name == CONTRAST, rest, 0))
            steps += [blend] * blend.changes()
    return sides


@functools.lru_cache(maxsize=16)
def _view_of(rows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(P,) the view that each piece belongs to. rows: (number of views, pixels of a view) for each size."""
    length = math.gcd(*(pixels for _, pixels in rows))
    pieces = torch.cat([torch.full((views,), pixels // length) for views, pixels in rows])  # of each view
    return send(torch.repeat_interleave(torch.arange(len(pieces)), pieces), device)


@functools.lru_cache(maxsize=4)
def _opposites(device: torch.device) -> Tensor:
    """(3, 1, 1) hue of cyan, magenta and yellow, in turns."""
    return send(torch.tensor(OPPOSITES).view(3, 1, 1), device)


def recolor_planes_(planes: Planes, drawn: Sequence[ViewParameters]) -> None:
    """Jitter, gray, blur and solarize the views in place. drawn: for each size, first axes V * B, on the CPU."""
    whole = ViewParameters.joined(drawn)
    channels, device = len(planes.pixels), planes.pixels.device
    view_of = _view_of(tuple(planes.rows()), device)
    x = planes.pixels.view(channels, len(view_of), -1)  # (C, P, q)
    before, after = blends_of(whole, channels)
    hue = torch.where(whole.jitter, whole.factors[:, HUE], 0.0)
    keep = 1 - whole.gray.float()
    limit = torch.where(whole.solarize, 1.0, NEVER)
    turned = (hue != 0).float()
    rows = [hue, turned, keep, (1 - keep) * sum(LUMA), limit, *(row for blend in before + after for row in blend)]
    table = torch.stack(rows)
    sent = send(table, device)  # (numbers, N)
    of_pieces = sent.index_select(1, view_of).unsqueeze(-1)  # (numbers, P, 1)
    blends = iter(zip(of_pieces[5:].split(3), sent[7::3], strict=True))
    for _ in before:
        _blend_(planes, x, view_of, *next(blends))
    if channels == 3 and bool(turned.any()):
        _turn_hue_(x, of_pieces[0], of_pieces[1])
    for _ in after:
        _blend_(planes, x, view_of, *next(blends))
    if channels == 3 and bool(whole.gray.any()):
        torch.addcmul(_gray(x).mul_(of_pieces[3]), x, of_pieces[2], out=x)
    for group, own in zip(planes.groups(), drawn, strict=True):
        _blur_(group.flatten(1, 2), own.sigma, own.blur)
    if bool(whole.solarize.any()):
        torch.minimum(x, of_pieces[4] - x, out=x)


def _gray(x: Tensor) -> Tensor:
    """(P, q) gray of RGB over the sum of `LUMA`, or the mean of other channels."""
    if len(x) != 3:
        return x.mean(0)
    red, green, blue = LUMA
    yellow = torch.lerp(x[1], x[0], red / (red + green))
    return torch.lerp(x[2], yellow, (red + green) / (red + green + blue), out=yellow)


def _blend_(planes: Planes, x: Tensor, view_of: Tensor, numbers: Tensor, mean_factor: Tensor) -> None:
    """One step: clamp(f x + a gray + c mean gray). numbers: f, a, c (3, P, 1); mean_factor: c of the views (N,)."""
    gray = _gray(x)
    means = torch.empty_like(mean_factor)
    flat, start, row = gray.flatten(), 0, 0
    for views, pixels in planes.rows():
        torch.mean(flat[start : start + views * pixels].view(views, pixels), 1, out=means[row : row + views])
        start, row = start + views * pixels, row + views
    level = means.mul_(mean_factor).index_select(0, view_of).unsqueeze(-1)  # (P, 1)
    torch.addcmul(level, gray, numbers[1], out=gray)
    torch.addcmul(gray, x, numbers[0], out=x).clamp_(0, 1)


def _turn_hue_(x: Tensor, shift: Tensor, turned: Tensor) -> None:
    """Turn the hue of x (3, P, q) by shift (P, 1) in turns, where turned (P, 1) is 1 and not 0: `color.hue_`, in fewer
    operators."""
    least, value = x.aminmax(dim=0)  # (P, q)
    chroma = value - least
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    side = (x[1] - x[2]).mul_(inverse)
    hue = torch.sub(x[0], least.add_(value), alpha=0.5).mul_(inverse)  # u_r - 1/2
    hue.mul_(side.abs().sub_(1.5)).mul_(1 / 3).add_(1 / 4).copysign_(side).add_(shift)
    distance = hue - _opposites(x.device)  # (3, P, q)
    distance.sub_(distance.round()).abs_()
    share = torch.rsub(distance, 2, alpha=6).clamp_(0, 1)
    torch.lerp(x, torch.addcmul(value, chroma, share, value=-1, out=share), turned, out=x)


def _blur_(x: Tensor, sigma: Tensor, apply: Tensor) -> None:
    """Blur the views in `apply` (N,) of x (C, N, h, w); sigma (N,) in pixels. The products as in `color.blur_`."""
    rows = apply.nonzero().squeeze(1)
    if not len(rows):
        return
    x = x.transpose(0, 1)  # (N, C, h, w)
    count, (channels, height, width) = len(rows), x.shape[1:]
    where, taps = send(rows, x.device), send(box_taps(sigma[rows]), x.device)
    chosen = x.index_select(0, where).view(count, channels * height, width)
    with full_precision(x.device):
        across = box_cubed(taps, width)
        down = across if height == width else box_cubed(taps, height)
        with tf32_products(x.device):
            middle = torch.bmm(across, chosen.transpose(1, 2)).view(count, width * channels, height)
            found = torch.bmm(middle, down.transpose(1, 2)).view(count, width, channels, height)
    x.index_copy_(0, where, found.permute(0, 2, 3, 1))


@functools.lru_cache(maxsize=16)
def _scale(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    gain = 1 / torch.tensor(std).view(-1, 1, 1)
    return send(gain, device), send(-torch.tensor(mean).view(-1, 1, 1) * gain, device)


def normalized(planes: Planes, mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """(x - mean) / std per channel, of the views of each size: (V, B, C, h, w)."""
    gain, shift = _scale(tuple(mean), tuple(std), planes.pixels.device)
    found = []
    for group in planes.groups():
        views = group.permute(1, 2, 0, 3, 4)
        out = torch.empty(views.shape, device=views.device)
        found.append(torch.addcmul(shift, views, gain, out=out))
    return found
