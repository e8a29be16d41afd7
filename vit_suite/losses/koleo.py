"""KoLeo: spread features evenly over the sphere (Sablayrolles et al. 2018, arXiv 1806.03198; used by DINOv2, arXiv
2304.07193; facebookresearch/dinov2 dinov2/loss/koleo_loss.py)."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""Added twice, as in the official code: to each component of the difference (PairwiseDistance), and to the distance."""


def koleo_loss(features: Tensor, own: slice = slice(None)) -> Tensor:
    """Minus the mean log distance to the nearest other row, after L2 normalization.

        loss = 0
        for i in own rows:
            loss -= log(min over j != i of |x_i - x_j|) / own rows

    Args:
        features: (N, D) of one view of the N >= 2 images of all ranks, with gradient. Deliberate difference: DINOv2
            compares only the images of one rank, so its loss depends on the number of ranks.
        own: the rows of this rank. The mean over ranks is the loss of one rank with all rows.

    Returns:
        Scalar. It is largest when two rows are equal, and smallest when rows are evenly spread.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=EPS)
        rows = unit[own]
        with torch.no_grad():  # no gradient through the choice of the nearest row, as in DINOv2
            similarities = rows @ unit.T
            similarities.diagonal(own.start or 0).fill_(-1.0)
            nearest = similarities.argmax(dim=-1)
        return -((rows - unit[nearest] + EPS).norm(dim=-1) + EPS).log().mean()
