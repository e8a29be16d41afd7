"""The end of a training that learned a classifier: its scores on the whole test set, and its confusion matrix."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vit_suite import distributed
from vit_suite.config import PretrainConfig
from vit_suite.config.limits import pair
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError, counted
from vit_suite.evaluation.classification import Classification, classify
from vit_suite.evaluation.interval import chance, wilson
from vit_suite.reports.confusion import save_confusion
from vit_suite.training.parts import Parts
from vit_suite.views.evaluate import view_text

log = logging.getLogger("vit_suite")


def has_test(data: ImageDataModule) -> bool:
    """Whether the data has a labeled split other than the training split."""
    try:
        labels = data.test_source.labels
    except UserError:
        return False
    return not data.scored_on_itself and labels is not None and bool((labels >= 0).any())


def score_test(cfg: PretrainConfig, parts: Parts, folder: Path) -> dict[str, Any]:
    """The scores of the whole test split, for results.json. All ranks share the work and get the scores.

    The first rank writes `confusion.png` and `confusion.csv` into `folder`, for at most 2,000 classes. A method without
    a classifier, or data without a labeled test split, gives an empty dict.
    """
    data, method = parts.data, parts.method
    classifier = method.classifier()
    if classifier is None or not has_test(data):
        return {}
    size = list(pair(cfg.views.global_size))
    scores = classify(method, data.test(), size, cfg.evaluate.batch_size, parts.precision, confusion=True)
    labels = data.test().labels
    assert labels is not None  # `has_test` has checked
    guessing = chance(labels, len(method.classes or []))
    low, high = wilson(scores.top1, scores.images)
    if distributed.rank() == 0:
        title = f"{data.name}, top-1 {scores.top1:.2f}% of {counted(scores.images, 'image')}"
        if scores.confusion is not None:
            save_confusion(folder, scores.confusion, method.classes or [], title)
        log.info("%s; 95%% interval of top-1 %.1f-%.1f; %s", sentence(scores), low, high, guessing)
    return {
        "top1": scores.top1,
        "top1_interval": [low, high],
        "top5": scores.top5,
        "chance": guessing.as_dict(),
        "calibration_error": scores.calibration_error,
        "nll": scores.nll,
        "test_images": scores.images,
    }


def test_protocol(cfg: PretrainConfig, parts: Parts) -> dict[str, object]:
    """The protocol of `score_test`: everything but the weights that its scores depend on."""
    average = parts.method.classifier() is not parts.method.trained()
    return {
        "split": parts.data.test_source.split,
        "images": parts.data.usable(parts.data.test()),
        "view": view_text(list(pair(cfg.views.global_size))),
        "precision": parts.precision,
        "weights": "their average (EMA) after the last step" if average else "those after the last step",
    }


def sentence(scores: Classification) -> str:
    """The scores in one line."""
    return (
        f"test: top-1 {scores.top1:.2f}%, top-5 {scores.top5:.2f}% of {counted(scores.images, 'image')}, "
        f"calibration error {100 * scores.calibration_error:.2f}% (15 bins), NLL {scores.nll:.4f} nats"
    )
