"""Weights of several losses, learned with them (Kendall, Gal, Cipolla 2018, arXiv 1705.07115; SiT losses.py
`LearnedLoss`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def uncertainty_weights(s: Tensor, a: Tensor, form: Literal["july", "april"]) -> Tensor:
    """The factor of each loss for s = log variance: e^(-a s) in the code of July 2021, a e^(-s) in that of April."""
    return torch.exp(-a * s) if form == "july" else a * torch.exp(-s)


def uncertainty_sum(losses: Tensor, s: Tensor, a: Tensor, form: Literal["july", "april"]) -> Tensor:
    """sum of factor x loss + s / 2 over the losses (n,): the second term keeps a factor from falling to 0.

    Args:
        losses, s: (n,) the losses and their learned log variances.
        a: (n,) 1 for classification, 0.5 for L1 (SiT).
    """
    return (uncertainty_weights(s, a, form) * losses + s / 2).sum()
