"""Sinkhorn-Knopp centering of a teacher's output (SwAV, arXiv 2006.09882, equation 3; facebookresearch/dinov2
dinov2/loss/dino_clstoken_loss.py `sinkhorn_knopp_teacher`).

Deliberate difference from the official code: a maximum is subtracted before exponentials are taken, so that large
logits do not overflow. The result is the same, because the first iteration divides each prototype by its sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_suite import distributed


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3, counted: Tensor | None = None) -> Tensor:
    """Probabilities (N, K) in fp32. Each row sums to 1, and each prototype has about the same share of all rows.

        q = exp(logits / temperature)
        for each iteration:
            q[:, k] /= sum of q[:, k] over the rows of all ranks      # prototypes share the rows equally
            q[i] /= sum of q[i]                                       # a row is a distribution

    Args:
        logits: (N, K) of this rank. N may differ between ranks.
        temperature: the teacher's temperature.
        iterations: at least 1 (DINOv2: 3).
        counted: (N,) bool; False for rows that only fill a buffer. They have no influence, and their result is 0.
    """
    scaled = logits.float() / temperature
    if counted is not None:
        scaled = scaled.masked_fill(~counted.unsqueeze(-1), -torch.inf)
    largest = distributed.max_over_ranks(scaled.amax(0))  # (K,)
    sums = distributed.sum_over_ranks((scaled - largest).exp().sum(0))
    rows = (scaled - (largest + sums.log())).softmax(dim=-1)
    if counted is not None:  # the softmax of a row of -inf is NaN
        rows = rows.masked_fill(~counted.unsqueeze(-1), 0)
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations - 1):
        rows = rows / distributed.sum_over_ranks(rows.sum(0)).clamp(min=tiny)
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=tiny)
    return rows
