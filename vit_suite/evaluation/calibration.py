"""Whether a classifier is right as often as it is confident: expected calibration error, negative log-likelihood.

Axes: N images, K classes, M bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15
"""As in Guo et al. 2017 (arXiv 1706.04599)."""
CHUNK = 4096
"""Rows of logits that are turned into float64 together."""


def reliability(logits: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """(M, 3) float64: number of images, mean confidence and accuracy of each bin of the top-1 confidence; zeros where a
    bin is empty.

    Bins are (m / M, (m + 1) / M], as in Guo et al. and their released code. logits (N, K), labels (N,).
    """
    tops = [rows.double().softmax(-1).max(-1) for rows in logits.split(CHUNK)]
    confidence, predicted = torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])
    place = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts = torch.bincount(place, minlength=bins).double()
    sums = [
        torch.bincount(place, weights=values, minlength=bins) for values in (confidence, (predicted == labels).double())
    ]
    return torch.stack([counts, *(total / counts.clamp(min=1) for total in sums)], dim=1)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """sum_m n_m / N |accuracy_m - confidence_m| over bins m of the top-1 confidence; 0..1."""
    counts, confidence, accuracy = reliability(logits, labels, bins).unbind(1)
    return float((counts * (accuracy - confidence).abs()).sum() / counts.sum())


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log softmax(logits)[label] over images, in nats."""
    parts = zip(logits.split(CHUNK), labels.split(CHUNK), strict=True)
    return sum(float(functional.cross_entropy(rows.double(), truth, reduction="sum")) for rows, truth in parts) / len(
        labels
    )
