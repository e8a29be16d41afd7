"""Mixup (Zhang et al. 2017, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899) and smoothed labels, in
timm's batch mode.

Deviations from timm, so that any number of ranks mixes the same images in the same way:

- Each slice of 128 rows of the global batch (`Draw.slices`) has one lambda and one rectangle. In timm each batch of a
  rank has them (DeiT: 128 images).
- An image is mixed with its neighbour (`Draw.partners`), which is on the same rank. timm mixes the batch with the batch
  in reverse order.

Axes: B images, C channels, K classes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.config import SupervisedConfig
from vit_suite.views.draw import Draw


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B, K) fp32 targets of labels (B,): smoothing / K everywhere and 1 - smoothing more at the label."""
    return functional.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)


def cut_box(height: int, width: int, lam: float, y: float, x: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels of CutMix's rectangle: sides sqrt(1 - lam) of the image's, centered at y, x
    (shares of the image's sides), cut off at its edges."""
    tall, wide = (int(side * (1 - lam) ** 0.5) for side in (height, width))
    middle, across = int(height * y), int(width * x)
    top, bottom = (min(max(edge, 0), height) for edge in (middle - tall // 2, middle + (tall + 1) // 2))
    left, right = (min(max(edge, 0), width) for edge in (across - wide // 2, across + (wide + 1) // 2))
    return top, bottom, left, right


def mix(images: Tensor, labels: Tensor, draw: Draw, cfg: SupervisedConfig, classes: int) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and their targets (B, K), whose rows sum to 1. The arguments do not change."""
    targets = smoothed(labels, classes, cfg.label_smoothing)
    if not (cfg.mixup or cfg.cutmix):
        return images, targets
    partners = draw.partners(images.device)
    mixed = [
        _mix(images[rows], images[partners[rows]], targets[rows], targets[partners[rows]], _drawn(draw, name, cfg))
        for rows, name in draw.slices()
    ]
    if len(mixed) == 1:
        return mixed[0]
    return torch.cat([part for part, _ in mixed]), torch.cat([part for _, part in mixed])


class _Mixture(NamedTuple):
    """How the images of a slice are mixed."""

    kind: Literal["none", "mixup", "cutmix"]
    lam: float
    """Weight of the image itself; its partner has 1 - lam."""
    y: float
    x: float
    """Center of CutMix's rectangle, in shares of the image's height and width."""


def _drawn(draw: Draw, name: str, cfg: SupervisedConfig) -> _Mixture:
    """The mixture of the slice of that name."""
    seed = torch.randint(2**62, (), generator=draw.generator(f"mix {name}"))
    random = np.random.default_rng(int(seed))  # PyTorch's Beta takes no generator
    whether, which, y, x = random.random(4)
    if whether >= cfg.mix_probability:
        return _Mixture("none", 1.0, y, x)
    cut = bool(cfg.cutmix) and (not cfg.mixup or which < cfg.cutmix_share)
    alpha = cfg.cutmix if cut else cfg.mixup
    return _Mixture("cutmix" if cut else "mixup", float(random.beta(alpha, alpha)), y, x)


def _mix(
    images: Tensor, others: Tensor, targets: Tensor, other_targets: Tensor, mixture: _Mixture
) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) and targets (n, K) mixed with those of their partners.

    In CutMix lam becomes the share of the pixels outside the rectangle, after the rectangle is cut off at the edges.
    """
    lam = mixture.lam
    if mixture.kind == "none":
        return images, targets
    if mixture.kind == "mixup":
        return torch.lerp(others, images, lam), torch.lerp(other_targets, targets, lam)
    top, bottom, left, right = cut_box(images.shape[-2], images.shape[-1], lam, mixture.y, mixture.x)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
    return mixed, torch.lerp(other_targets, targets, lam)
