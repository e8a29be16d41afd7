"""Views rotated by quarter turns: SiT's rotation task (Gidaris et al. 2018, arXiv 1803.07728)."""

from __future__ import annotations

import torch
from torch import Tensor

from vit_suite.hardware import send
from vit_suite.views.draw import Draw

UNIFORM = 0.75
"""Share of rotated views for which the four labels are equally frequent."""


def draw_turns(draw: Draw, views: int, device: torch.device, share: float = UNIFORM, together: bool = False) -> Tensor:
    """(V, B) int64 labels 0..3 of V views of B images.

    share: probability that a view is rotated; the three turns are equally likely.
    together: all views of an image have the same turn. Otherwise each view has its own.
    """
    uniform = draw.uniform(views, purpose="rotation").T  # (V, B) in 0..1
    if together:
        uniform = uniform[:1].expand_as(uniform)
    upright = 1 - share
    turned = 1 + ((uniform - upright) * (3 / share)).long().clamp(0, 2)  # rounding must not make a fourth turn
    return send(torch.where(uniform < upright, 0, turned).contiguous(), device)


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Images (..., C, S, S) rotated clockwise by `turns` (...) x 90 degrees.

    Label 1 is clockwise, as in SiT's code since July 2021. Its code of April 2021 rotated the other way, and flipped
    after the rotation.
    """
    out = images
    for turn in (1, 2, 3):
        out = torch.where((turns == turn)[..., None, None, None], torch.rot90(images, -turn, (-2, -1)), out)
    return out
