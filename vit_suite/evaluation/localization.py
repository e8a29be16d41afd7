"""How well masks, boxes and points find the objects of images, with the baselines that make such a score readable.

The truth of an image is a mask or boxes. Scores against a mask: the Jaccard index, in which pixels can be left out, as
VOC's borders are. Scores against boxes: the IoU of the box around the mask's largest region with the truth box that it
fits best, and CorLoc, the share of images where that IoU reaches 0.5. For both there is the pointing game: whether the
maximum of the map lies on an object (Zhang et al. 2016, without their tolerance of 15 pixels).

DINO (arXiv 2104.14294, section 4.2.2) lets the truth choose the head of every image, which flatters any model. So three
rows stand side by side:

- best head: the paper's; the truth chooses the head of each image;
- fixed head: one head for all images;
- mean map: the mean over heads.

Threshold and fixed head are chosen on OTHER images than the scored ones. Two baselines stand beside the rows: the whole
image, and a centered box of the best fixed size. That size is chosen on the scored images themselves, so the box is an
upper bound for any fixed centered box.

Deviations from published protocols: objects of all classes are one mask (DINO's score has no published code; the
re-implementation of Naseer et al. 2021 scores class by class and averages); images without an object are left out.

Axes: N images, M maps (heads, then their mean), T thresholds, H x W pixels, gh x gw cells of a mask, K truth boxes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from vit_suite.evaluation.regions import largest_region, mask_boxes

HIT = 0.5
"""IoU from which a box counts as found (CorLoc)."""
STEPS = 20
"""Sizes of the centered box that are tried, a side."""

# Truth
# ----------------------------------------------------------------------------------------------------------------------


def jaccard(masks: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks, bool (..., gh, gw), with one truth: float64 (...).

    truth: int8 (H, W) of 1 object, 0 ground, -1 left out. A cell covers the pixels whose center it holds
    (attention.maps.upsample, nearest). Two empty masks agree: 1. ValueError when a mask is not bool, because bytes of
    0 and 255 would count as sizes.
    """
    if masks.dtype != torch.bool:
        raise ValueError(f"Jaccard needs bool masks, not {masks.dtype}")
    # The pixels of each cell are counted once. Then a mask costs gh x gw products, not H x W.
    grid = masks.shape[-2], masks.shape[-1]
    objects, counted = _in_cells(truth == 1, grid), _in_cells(truth >= 0, grid)
    chosen = masks.double().flatten(-2)
    shared = chosen @ objects
    either = chosen @ counted + objects.sum() - shared
    return torch.where(either > 0, shared / either.clamp_min(1), 1.0)


def _in_cells(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool (H, W) -> float64 (gh * gw,): how many pixels of each cell are set."""
    counts = pixels.double()
    for dim, cells in enumerate(grid):
        side = pixels.shape[dim]
        place = (2 * torch.arange(side) + 1) * cells // (2 * side)
        shape = [cells, counts.shape[1]] if dim == 0 else [counts.shape[0], cells]
        counts = counts.new_zeros(shape).index_add_(dim, place, counts)
    return counts.flatten()


def overlap(masks: Tensor, truth: Tensor, size: tuple[int, int]) -> Tensor:
    """How well each mask (..., gh, gw) fits the truth of an image of `size` (H, W): float64 (...), 0..1.

    truth int8 (H, W): the Jaccard index. truth float (K, 4) in pixels: IoU of the box around the mask's largest region
    with the truth box that it fits best.
    """
    if not truth.is_floating_point():
        return jaccard(masks, truth)
    (height, width), (rows, columns) = size, masks.shape[-2:]
    cell = torch.tensor([width / columns, height / rows] * 2)
    boxes = mask_boxes(largest_region(masks)) * cell
    return box_iou(boxes.view(-1, 4).double(), truth.double()).amax(1).view(masks.shape[:-2])


def on_object(cells: Tensor, grid: tuple[int, int], truth: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether the centers of these cells (...), row-major, lie on an object: bool (...).

    truth: int8 (H, W), or boxes float (K, 4).
    """
    y = (cells // grid[1] + 0.5) * size[0] / grid[0]
    x = (cells % grid[1] + 0.5) * size[1] / grid[1]
    if not truth.is_floating_point():
        return truth[y.long(), x.long()] == 1
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    x0, y0, x1, y1 = truth.unbind(1)
    return ((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).any(-1)


# Without a model
# ----------------------------------------------------------------------------------------------------------------


def center_overlaps(truth: Tensor, size: tuple[int, int], steps: int = STEPS) -> Tensor:
    """`overlap` of centered boxes whose height and width are 1/steps .. steps/steps of the image's: (steps, steps).

    The last one is the whole image. Against a mask, boxes are rounded to whole pixels.
    """
    (height, width), shares = size, torch.arange(1, steps + 1) / steps
    if truth.is_floating_point():
        down, across = (side * shares.double() / 2 for side in size)
        ends = torch.cartesian_prod(down, across)  # (steps^2, 2) half heights and widths
        middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
        boxes = torch.cat((middle - ends.flip(1), middle + ends.flip(1)), 1)
        return box_iou(boxes, truth.double()).amax(1).view(steps, steps)
    (top, bottom), (left, right) = (_middle(side, shares) for side in size)
    objects, counted = (_box_sums(pixels, top, bottom, left, right) for pixels in (truth == 1, truth >= 0))
    return objects / (counted + (truth == 1).sum() - objects).clamp_min(1)


def _middle(side: int, shares: Tensor) -> tuple[Tensor, Tensor]:
    """First and last (exclusive) pixel of centered stretches of a side."""
    length = (side * shares).round().long().clamp(1, side)
    start = (side - length) // 2
    return start, start + length


def _box_sums(pixels: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """bool (H, W) -> (len(top), len(left)): pixels set in each box, from one cumulative table."""
    table = torch.nn.functional.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    strips = table[bottom] - table[top]
    return strips[:, right] - strips[:, left]


def covered(truth: Tensor, size: tuple[int, int]) -> float:
    """Share of the image that is object (among the pixels that count) or lies in a box: how often a random point wins
    the pointing game."""
    if not truth.is_floating_point():
        return float((truth == 1).sum() / (truth >= 0).sum().clamp_min(1))
    x, y = (torch.arange(side) + 0.5 for side in reversed(size))
    x0, y0, x1, y1 = (end.view(-1, 1) for end in truth.unbind(1))
    columns, rows = ((first <= at) & (at < last) for first, at, last in ((x0, x, x1), (y0, y, y1)))
    return float((rows.unsqueeze(2) & columns.unsqueeze(1)).any(0).double().mean())


# Scores
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What one method found in N images."""

    overlaps: Tensor
    """float64 (N, M, T)."""
    hits: Tensor
    """bool (N, M): the pointing game."""
    thresholds: tuple[float, ...] | None = None
    """Of the T masks; None for a method that has none (T is 1)."""
    heads: bool = False
    """Whether the maps are heads, and behind them their mean."""


@dataclass(frozen=True)
class Score:
    """A row of the table, in percent."""

    overlap: float
    """Mean Jaccard index or mean box IoU."""
    found: float
    """Share of images whose overlap reaches 0.5: of boxes, CorLoc."""
    pointing: float
    """Pointing game."""
    threshold: float | None = None
    """The one of the best mean overlap on the choosing images."""
    head: int | None = None
    """Likewise, counted from 0."""
    pointing_head: int | None = None
    """The head that points best on the choosing images."""
    sweep: tuple[float, ...] | None = None
    """Mean overlap at every threshold; a fixed head is chosen for each."""

    def named(self, kind: Literal["masks", "boxes"]) -> dict[str, float | int | list | None]:
        """As results.json has it: without what does not apply; CorLoc belongs to boxes."""
        named = {
            ("jaccard" if kind == "masks" else "box_iou") if k == "overlap" else k: v for k, v in asdict(self).items()
        }
        corloc = named.pop("found")
        return {k: v for k, v in named.items() if v is not None} | ({"corloc": corloc} if kind == "boxes" else {})


def score(found: Found, choosing: Tensor) -> dict[str, Score]:
    """Rows by name: for heads "best head", "fixed head" and "mean map"; for other methods one row named "".

    `choosing` bool (N,): the images that choose thresholds and heads; the others are scored. ValueError when either
    part is empty.
    """
    if not 0 < int(choosing.sum()) < len(choosing):
        raise ValueError(f"{len(choosing)} images cannot be split into some that choose and some that are scored")
    if not found.heads:
        return {"": _row(found, choosing, found.overlaps[:, 0], found.hits[:, 0])}
    overlaps, hits = found.overlaps[:, :-1], found.hits[:, :-1]
    heads = overlaps[choosing].mean(0).argmax(0)  # (T,)
    fixed = torch.stack([overlaps[:, head, t] for t, head in enumerate(heads.tolist())], 1)
    pointing_head = int(hits[choosing].double().mean(0).argmax())
    return {
        "best head": _row(found, choosing, overlaps.amax(1), hits.any(1)),
        "fixed head": _row(found, choosing, fixed, hits[:, pointing_head], heads.tolist(), pointing_head),
        "mean map": _row(found, choosing, found.overlaps[:, -1], found.hits[:, -1]),
    }


def _row(
    found: Found,
    choosing: Tensor,
    overlaps: Tensor,
    hits: Tensor,
    heads: list[int] | None = None,
    pointing_head: int | None = None,
) -> Score:
    """overlaps (N, T), hits (N,); `heads`: one for each threshold."""
    at = int(overlaps[choosing].mean(0).argmax())
    means = 100 * overlaps[~choosing].mean(0)
    return Score(
        overlap=float(means[at]),
        found=_percent(overlaps[~choosing, at] >= HIT),
        pointing=_percent(hits[~choosing]),
        threshold=found.thresholds[at] if found.thresholds else None,
        head=heads[at] if heads else None,
        pointing_head=pointing_head,
        sweep=tuple(means.tolist()) if found.thresholds else None,
    )


def _percent(values: Tensor) -> float:
    return float(100 * values.double().mean())


@dataclass(frozen=True)
class Baselines:
    """Scores of what looks at nothing."""

    center_box: Score
    """The centered box of the best fixed size for each score, chosen on the scored images; it points at the center."""
    sizes: dict[str, tuple[float, float]]
    """(height, width) shares of that box for the mean overlap, and for the share that is found."""
    whole_image: Score
    """It points anywhere."""


def baselines(overlaps: Tensor, center_hits: Tensor, shares: Tensor) -> Baselines:
    """overlaps (N, steps, steps) of `center_overlaps`, center_hits bool (N,), shares (N,) of `covered`; all of scored
    images."""
    steps = overlaps.shape[1]
    means, found = overlaps.mean(0), (overlaps >= HIT).double().mean(0)

    def size(scores: Tensor) -> tuple[float, float]:
        row, column = divmod(int(scores.argmax()), steps)
        return (row + 1) / steps, (column + 1) / steps

    return Baselines(
        Score(100 * float(means.max()), 100 * float(found.max()), _percent(center_hits)),
        {"overlap": size(means), "found": size(found)},
        Score(100 * float(means[-1, -1]), 100 * float(found[-1, -1]), _percent(shares)),
    )
