"""Gram anchoring: keep the similarities between patches as they were in an earlier teacher (DINOv3, arXiv 2508.10104,
section 4.2; facebookresearch/dinov3 dinov3/loss/gram_loss.py `GramLoss`).

Axes: B images, N patches, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_loss(
    student: Tensor,
    anchor: Tensor,
    within_image: bool = True,
    normalize: bool = True,
    negatives: Literal["keep", "drop", "drop_anchor"] = "keep",
) -> Tensor:
    """Mean squared difference between two matrices of patch similarities, with their diagonals.

        for each image b, and patches i, j of it:
            total += (student[b, i] . student[b, j] - anchor[b, i] . anchor[b, j])^2
        loss = total / (B N N)

    Args:
        student: (B, N, D) patch features, with gradient; without `within_image` also (M, D) of some patches.
        anchor: the same of the Gram teacher, without gradient.
        within_image: whether to compare only patches of the same image.
        normalize: whether similarities are cosines; else they are dot products.
        negatives: keep = unchanged; drop = negative similarities of both count as 0; drop_anchor = only those of the
            anchor do. The official `remove_only_teacher_neg` computes the last one: its second test, which would reach
            the student, comes after the anchor was clamped, and is never true.
    """
    if not within_image:
        student, anchor = (features.flatten(0, -2).unsqueeze(0) for features in (student, anchor))
    with torch.autocast(student.device.type, enabled=False):  # bf16 has three digits, and the differences are small
        ours, theirs = (_similarities(features.float(), normalize) for features in (student, anchor.detach()))
    if negatives != "keep":
        theirs = theirs.clamp(min=0)
    if negatives == "drop":
        ours = ours.clamp(min=0)
    return F.mse_loss(ours, theirs)


def _similarities(features: Tensor, normalize: bool) -> Tensor:
    """(B, N, D) -> (B, N, N)."""
    if normalize:
        features = F.normalize(features, dim=-1)
    return features @ features.mT


def resize_features(features: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize patch features (B, h w, D) of `grid` (h, w) to (B, h' w', D) of `target` (h', w'): bicubic without
    antialias, as DINOv3 does for a Gram teacher that sees larger images."""
    if grid == target:
        return features
    maps = features.float().mT.unflatten(-1, grid)  # (B, D, h, w)
    return F.interpolate(maps, size=target, mode="bicubic", align_corners=False).flatten(2).mT
