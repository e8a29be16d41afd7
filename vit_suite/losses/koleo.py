"""KoLeo: spread features evenly over the sphere (Sablayrolles et al. 2018, arXiv 1806.03198; used by DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

import torch
from torch import Tensor


def koleo_loss(features: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest other row, after L2 normalisation.

        loss = 0
        for i in rows:
            loss -= log(min over j != i of |x_i - x_j|) / rows

    Args:
        features: (B, D), one view of B images, at least 2.

    Returns:
        Scalar. A collapse of two rows onto each other costs most; evenly spread rows cost least.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        with torch.no_grad():  # which row is nearest is not differentiated, as in DINOv2
            nearest = (unit @ unit.T).fill_diagonal_(-1.0).argmax(dim=-1)
        return -((unit - unit[nearest]).norm(dim=-1) + 1e-8).log().mean()
