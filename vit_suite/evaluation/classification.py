"""Scores of a classifier: top-1, top-5, calibration, confusion.

Axes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vit_suite.errors import UserError
from vit_suite.evaluation.calibration import expected_calibration_error, negative_log_likelihood
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.hardware import AskedPrecision

MOST_CONFUSED = 2000
"""Classes up to which a confusion matrix is made. Of 22,000 classes it would take 3.9 GB, and no picture could show
it."""
CHUNK = 4096
"""Rows of logits that are looked at together in float64: 0.7 GiB of 22,000 classes."""


class Classification(NamedTuple):
    """Scores of N images; percentages 0..100, the calibration error 0..1, the likelihood in nats."""

    top1: float
    top5: float
    calibration_error: float
    nll: float
    confusion: Tensor | None
    """int64 (K, K): images of class `row` that were taken for class `column`; None unless it was asked for, and above
    `MOST_CONFUSED` classes."""
    images: int


def top_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Percent of the images (N,) whose label is among the k largest logits (N, K); among all K when k is larger."""
    k, hits = min(k, logits.shape[1]), 0
    for rows, truth in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        hits += int((rows.topk(k).indices == truth[:, None]).sum())
    return 100 * hits / len(labels)


def score_logits(logits: Tensor, labels: Tensor, confusion: bool = False) -> Classification:
    """Every score of logits (N, K) against labels (N,). UserError for a label that the head has no place for.

    `confusion`: make the confusion matrix too, of at most `MOST_CONFUSED` classes.
    """
    classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        worst = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise UserError(f"label {worst} of the scored images has no place in a head of {classes} classes.")
    wanted = confusion and classes <= MOST_CONFUSED
    return Classification(
        top_accuracy(logits, labels, 1),
        top_accuracy(logits, labels, 5),
        expected_calibration_error(logits, labels),
        negative_log_likelihood(logits, labels),
        multiclass_confusion_matrix(logits.argmax(1), labels, classes) if wanted else None,
        len(labels),
    )


def classify(
    module: Any,
    source: Any,
    image_size: Iterable[int],
    batch_size: int,
    precision: AskedPrecision,
    confusion: bool = False,
) -> Classification:
    """Score the classifier of a supervised `module` on the images of `source` under the evaluation view.

    All ranks call this, and all get the scores. confusion: as for `score_logits`."""
    options = FeatureOptions(batch_size, module.device, precision, unit=False)
    found = extract_features(module.classifier(), source, list(image_size), module.mean, module.std, options)
    return score_logits(found.features, found.labels, confusion)
