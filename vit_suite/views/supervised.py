"""The view of supervised training, made in batches: crop, flip, RandAugment, color, normalize, erase, in timm's order.

Axes: B images, C channels, side S.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vit_suite.config import SupervisedViewsConfig
from vit_suite.config.limits import pair
from vit_suite.errors import UserError
from vit_suite.hardware import send
from vit_suite.views.draw import Draw
from vit_suite.views.multicrop import (
    ATTEMPTS,
    draw_boxes,
    draw_views,
    image_sizes,
    normalize_,
    recolor_,
    validate_views,
)
from vit_suite.views.randaugment import randaugment_
from vit_suite.views.resample import crop_resize_views

BORDER = 1 / 8
"""Width of the black border of a padded crop, as a share of the image's side: 4 pixels of 32, as in every CIFAR
recipe."""
ERASE_RATIO = (0.3, 1 / 0.3)
"""Width over height of an erased rectangle, [least, most] (Zhong et al. 2017, arXiv 1708.04896)."""


class SupervisedViews:
    """`views(images, draw)`: [(B, C, S, S)], augmented and normalized, on the images' device; picklable.

    mean, std: C floats in 0..1.
    """

    def __init__(self, cfg: SupervisedViewsConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        validate_views(cfg)
        if not 0 < cfg.erase_area[0] <= cfg.erase_area[1]:
            raise UserError(
                f"views.erase_area: expected [least, most], both above 0, least first; got {cfg.erase_area}."
            )
        if cfg.randaugment and len(mean) not in (1, 3):
            raise UserError(
                f"views.randaugment works on 1 or 3 channels, not {len(mean)}: turn it off with --views.randaugment 0."
            )
        self.cfg = cfg
        self.mean, self.std = list(mean), list(std)

    def __call__(self, images: Tensor | Sequence[Tensor], draw: Draw) -> list[Tensor]:
        """images: uint8 or float 0..1 (B, C, H, W), or a list of (C, H_i, W_i): the rows' images."""
        cfg = self.cfg
        sizes = image_sizes(images)
        drawn = draw_views(cfg, sizes, draw)
        boxes = drawn.boxes
        if cfg.crop == "padded":
            images, boxes = bordered(images), shifted_boxes(sizes, draw.uniform(2, purpose="shift")).unsqueeze(1)
        x = crop_resize_views(images, boxes, drawn.flip, pair(cfg.global_size), cfg.interpolation)[0]
        if cfg.randaugment:
            randaugment_(x, draw, cfg, self.mean)
        recolor_(x, drawn.views(slice(None)))
        normalize_(x, self.mean, self.std)
        return [erase_(x, draw, cfg.erase, cfg.erase_area) if cfg.erase else x]


def borders(sizes: Tensor) -> Tensor:
    """Pixels of border (..., 2) at top and left of images of size (..., 2)."""
    return (sizes * BORDER).round().long()


def bordered(images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """The images with their black borders."""
    if not isinstance(images, Tensor):
        return [bordered(image[None])[0] for image in images]
    tall, wide = borders(torch.tensor(images.shape[-2:])).tolist()
    return functional.pad(images, (wide, wide, tall, tall))


def shifted_boxes(sizes: Tensor, uniform: Tensor) -> Tensor:
    """Boxes (B, 4) of the sizes (B, 2) of the images, anywhere in their bordered images; uniform (B, 2) in 0..1."""
    place = (uniform * (2 * borders(sizes) + 1)).floor().long()
    return torch.cat([place, sizes], 1)


def erase_(x: Tensor, draw: Draw, probability: float, area: Sequence[float]) -> Tensor:
    """Put N(0, 1) noise into a rectangle of normalized x (B, C, S, S), in place; each image has one with `probability`.

    This is timm's mode `pixel`. area: [least, most] share of the view. Deviation from timm: all images of a step take
    their noise from one field of S x S pixels, each at its own rectangle. So all ranks have the same noise, and no rank
    draws that of the whole global batch.
    """
    count, channels, height, width = x.shape
    uniform = draw.uniform(2 * ATTEMPTS + 3, purpose="erase")
    sides = torch.tensor([height, width]).expand(count, 2)
    boxes = draw_boxes(uniform[:, 1:], sides[:, 0], sides[:, 1], torch.tensor(area).expand(count, 2), ERASE_RATIO)
    chosen = uniform[:, 0] < probability
    top, left, tall, wide = boxes.unsqueeze(-1).unbind(1)  # each (B, 1)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + tall) & chosen.unsqueeze(1)  # (B, S)
    inside_columns = (columns >= left) & (columns < left + wide)
    noise = send(torch.randn(channels, height, width, generator=draw.generator("erase noise")), x.device)
    mask = send(inside_rows, x.device)[:, None, :, None] & send(inside_columns, x.device)[:, None, None, :]
    return x.copy_(torch.where(mask, noise, x))
