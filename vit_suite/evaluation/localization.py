"""How well attention masks cover the objects of images: Jaccard index, with the baselines that make it readable.

DINO (arXiv 2104.14294, section 4.2.2) scores VOC12 by thresholding each head's attention at the top share of its mass and taking, for
every truth mask, the best head. The truth thus chooses the head, which flatters any model; so three numbers stand side by side:

- best head: the official number, the mean over images of the largest Jaccard index of any head;
- fixed head: one head for all images, chosen on OTHER images (`choose_head`);
- mean map: the mask of the mean over heads; nothing is chosen.

and two baselines that need no model: the whole image, and a centred box whose shape was chosen on other images.

Axes: B images, h heads, H x W pixels. Masks are bool; making them from attention is vit_suite.attention.maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union: bool (..., H, W) twice, broadcast against each other -> float64 (...), in 0..1.

    Two empty masks agree: 1. Raises ValueError when the pixels do not match or a mask is not bool (0/255 bytes would count as sizes).
    """
    if masks.dtype != torch.bool or truth.dtype != torch.bool:
        raise ValueError(f"Jaccard needs bool masks, not {masks.dtype} and {truth.dtype}")
    if masks.shape[-2:] != truth.shape[-2:]:
        raise ValueError(f"masks of {tuple(masks.shape[-2:])} pixels cannot be scored against a truth of {tuple(truth.shape[-2:])}")
    shared = (masks & truth).sum((-2, -1)).double()
    either = (masks | truth).sum((-2, -1)).double()
    return torch.where(either > 0, shared / either.clamp_min(1), torch.ones_like(either))


@dataclass(frozen=True)
class LocalizationScores:
    """Mean Jaccard index over images, in percent."""

    images: int
    best_head: float
    """The truth chooses the head of each image: an upper bound, the number of the DINO paper."""
    heads: tuple[float, ...]
    """Each head alone, for all images."""
    fixed_head: float | None = None
    """The head that was chosen on other images."""
    head: int | None = None
    """Which one that is, counted from 0."""
    mean_map: float | None = None
    """The mask of the mean over heads."""

    def items(self) -> Iterator[tuple[str, float]]:
        """(name, percent) of what was measured."""
        for name in ("best_head", "fixed_head", "mean_map"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)


def score_masks(masks: Tensor, truth: Tensor, mean_masks: Tensor | None = None, head: int | None = None) -> LocalizationScores:
    """Score the masks (B, h, H, W) of every head against `truth` (B, H, W).

    `mean_masks` (B, H, W): masks of the mean map. `head`: the fixed head, from `choose_head` on other images.
    """
    scores = jaccard(masks, truth[:, None])  # (B, h)
    if len(scores) == 0:
        raise ValueError("no images to score")
    heads = tuple((100 * scores.mean(0)).tolist())
    return LocalizationScores(
        images=len(scores),
        best_head=float(100 * scores.amax(1).mean()),
        heads=heads,
        fixed_head=None if head is None else heads[head],
        head=head,
        mean_map=None if mean_masks is None else float(100 * jaccard(mean_masks, truth).mean()),
    )


def choose_head(masks: Tensor, truth: Tensor) -> int:
    """The head with the highest mean Jaccard index over these images (the first of equals): masks (B, h, H, W), truth (B, H, W).

    Give it images that are not scored afterwards.
    """
    return int(jaccard(masks, truth[:, None]).mean(0).argmax())


def center_box(size: tuple[int, int], shares: tuple[float, float]) -> Tensor:
    """bool (H, W): a centred box of `shares` of the height and of the width (0..1), rounded to pixels; (1, 1) is the whole image."""
    mask = torch.zeros(size, dtype=torch.bool)
    (top, bottom), (left, right) = (_middle(side, share) for side, share in zip(size, shares, strict=True))
    mask[top:bottom, left:right] = True
    return mask


def _middle(side: int, share: float) -> tuple[int, int]:
    length = max(1, min(side, round(side * share)))
    start = (side - length) // 2
    return start, start + length


def best_center_box(truth: Tensor, steps: int = 20) -> tuple[float, float]:
    """(height share, width share) of the centred box with the highest mean Jaccard index on `truth` (B, H, W); sizes are tried in
    `steps` steps a side. Give it images that are not scored afterwards, the ones `choose_head` gets."""
    size = tuple(truth.shape[-2:])
    # Sums over any box from one cumulative table: steps^2 boxes cost no more than one pass over the pixels.
    table = torch.nn.functional.pad(truth.double().cumsum(-2).cumsum(-1), (1, 0, 1, 0))  # (B, H + 1, W + 1)
    total = table[:, -1, -1]
    best, chosen = -1.0, (1.0, 1.0)
    for row in range(1, steps + 1):
        for column in range(1, steps + 1):
            shares = (row / steps, column / steps)
            (top, bottom), (left, right) = (_middle(side, share) for side, share in zip(size, shares, strict=True))
            inside = table[:, bottom, right] - table[:, top, right] - table[:, bottom, left] + table[:, top, left]
            score = float((inside / (total + (bottom - top) * (right - left) - inside)).mean())
            if score > best:
                best, chosen = score, shares
    return chosen


def baseline_scores(truth: Tensor, box: tuple[float, float]) -> dict[str, float]:
    """Mean Jaccard index in percent of two masks that look at nothing: {"whole_image", "center_box"}.

    truth (B, H, W); `box` from `best_center_box` on other images.
    """
    size = tuple(truth.shape[-2:])
    shapes = {"whole_image": (1.0, 1.0), "center_box": box}
    return {name: float(100 * jaccard(center_box(size, shares).to(truth.device), truth).mean()) for name, shares in shapes.items()}
