"""Contrastive losses of SiT: NT-Xent of version 1 (Chen et al. 2020, arXiv 2002.05709, equation 1) and InfoNCE of
version 3.

Axes: B images of this rank, N images of all ranks (rows offset to offset + B are this rank's), D width. Similarities
are cosines in fp32. Both functions return the logits and the column of the positive, so that one matrix product gives
loss and accuracy:

    loss = F.cross_entropy(logits, positive);  accuracy = (logits.argmax(-1) == positive).mean()
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent_logits(
    first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, temperature: float, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Compare every view with all other views of all images. Its positive is the other view of its own image.

        for i in the 2 B views of this rank:
            loss -= log(exp(sim(i, positive of i) / t) / sum over k != i of exp(sim(i, k) / t)) / (2 B)

    Args:
        first, second: (B, D) embeddings of the two views.
        all_first, all_second: (N, D) the same of all ranks, with gradient.
        temperature: t.
        offset: the row of this rank's first image among those of all ranks.

    Returns:
        Logits (2 B, 2 N), with -inf for a view and itself, and the column of each positive (2 B,) int64.
    """
    count, total = len(first), len(all_first)
    logits = _cosines(torch.cat([first, second]), torch.cat([all_first, all_second])) / temperature
    own = torch.arange(count, device=first.device) + offset
    own = torch.cat([own, own + total])  # the column of each view itself
    logits = logits.scatter(1, own.unsqueeze(1), -torch.inf)
    return logits, own.roll(count)  # the column of a view's positive is that of the other view


def info_nce_logits(queries: Tensor, keys: Tensor, temperature: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Compare a student's views (B, D) with an EMA teacher's other views (N, D), which get no gradient. Returns logits
    (B, N) and the column of each positive (B,)."""
    logits = _cosines(queries, keys.detach()) / temperature
    return logits, torch.arange(len(queries), device=queries.device) + offset


def info_nce(logits: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Cross-entropy times 2 x temperature, as MoCo v3 (arXiv 2104.02057, section 3) and SiT version 3 scale it."""
    return 2 * temperature * F.cross_entropy(logits, positive)


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T
