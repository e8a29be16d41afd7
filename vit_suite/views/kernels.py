"""The kernels of a resize."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["bicubic", "bilinear", "bilinear_plain"]
"""Antialiased; bilinear_plain is not: it reads the two nearest pixels even where a resize shrinks (TensorFlow)."""
RADIUS: dict[Kernel, float] = {"bicubic": 2.0, "bilinear": 1.0, "bilinear_plain": 1.0}
"""Half the width of a kernel that is not stretched, in pixels."""


def stretch_of(step: Tensor, kernel: Kernel) -> Tensor:
    """How much the kernel is stretched where neighbours of the output lie `step` pixels apart: an enlarging resize
    keeps it one source pixel wide."""
    return torch.ones_like(step) if kernel == "bilinear_plain" else step.clamp(min=1)


def kernel_(distance: Tensor, kernel: Kernel) -> Tensor:
    """The kernel at signed distances in pixels, in place.

    Catmull-Rom has two cubic pieces. With p2 = max(2 - |d|, 0) and p1 = max(1 - |d|, 0) both are one expression without
    branches, -p2^2 (1 - p2) / 2 + p1^2 (1 - 2 p1). It takes a third of the passes over memory that two `where` take.
    """
    if kernel != "bicubic":
        return distance.abs_().neg_().add_(1).clamp_(min=0)
    outer = distance.abs_().neg_().add_(2).clamp_(min=0)
    inner = (outer - 1).clamp_(min=0)
    square = outer * outer
    outer.sub_(1).mul_(square).mul_(0.5)
    torch.mul(inner, inner, out=square)
    return outer.addcmul_(square, inner.mul_(-2).add_(1))
