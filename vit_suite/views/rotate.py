"""Views turned by quarter turns, SiT's rotation task (Gidaris et al. 2018, arXiv 1803.07728)."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_suite.hardware import send
from vit_suite.views.draw import Draw


def draw_turns(draw: Draw, views: int, device: torch.device) -> Tensor:
    """(V, B) int64 labels 0..3, each view its own."""
    return send((draw.uniform(views, purpose="rotation").T * 4).long().contiguous(), device)


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Images (..., C, S, S) turned clockwise by `turns` (...) x 90 degrees.

    Label 1 is clockwise, as in SiT's code from July 2021 on; April's turned the other way, and flipped after turning.
    """
    out = images
    for turn in (1, 2, 3):
        out = torch.where((turns == turn)[..., None, None, None], torch.rot90(images, -turn, (-2, -1)), out)
    return out
