"""Mixup (Zhang et al. 2017, arXiv 1710.09412), CutMix (Yun et al. 2019, arXiv 1905.04899) and smoothed labels, timm's
batch mode.

One lambda and one rectangle an optimizer step, as timm draws them a batch. Deviation: an image is mixed with its
neighbour (`Draw.partners`), where timm takes the batch in reverse: neighbours are on one rank, so any number of ranks
mixes alike.

Axes: B images, C channels, K classes.
"""

from __future__ import annotations

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
    """(top, bottom, left, right) in pixels of CutMix's rectangle: sides sqrt(1 - lam) of the image's, centerd at shares
    y, x of the image, cut off at its edges."""
    tall, wide = (int(side * (1 - lam) ** 0.5) for side in (height, width))
    middle, across = int(height * y), int(width * x)
    top, bottom = (min(max(edge, 0), height) for edge in (middle - tall // 2, middle + (tall + 1) // 2))
    left, right = (min(max(edge, 0), width) for edge in (across - wide // 2, across + (wide + 1) // 2))
    return top, bottom, left, right


def mix(images: Tensor, labels: Tensor, draw: Draw, cfg: SupervisedConfig, classes: int) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and their targets (B, K), each row of which sums to 1; the arguments stay as they are.

    CutMix's share is that of the pixels that stay, after the rectangle was cut off at the edges.
    """
    targets = smoothed(labels, classes, cfg.label_smoothing)
    if not (cfg.mixup or cfg.cutmix):
        return images, targets
    seed = torch.randint(2**62, (), generator=draw.generator("mix"))
    random = np.random.default_rng(int(seed))  # PyTorch's Beta takes no generator
    whether, which, y, x = random.random(4)
    if whether >= cfg.mix_probability:
        return images, targets
    cut = bool(cfg.cutmix) and (not cfg.mixup or which < cfg.cutmix_share)
    alpha = cfg.cutmix if cut else cfg.mixup
    lam = float(random.beta(alpha, alpha))
    partners = draw.partners(images.device)
    if cut:
        top, bottom, left, right = cut_box(*images.shape[-2:], lam, y, x)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images[partners, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / images[0, 0].numel()
    else:
        mixed = torch.lerp(images[partners], images, lam)
    return mixed, torch.lerp(targets[partners], targets, lam)
