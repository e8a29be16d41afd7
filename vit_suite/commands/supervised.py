"""What a supervised run needs besides training: class names, a head that fits them, scores of the whole test set at the
end."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vit_suite import distributed
from vit_suite.commands.data_of import view_text
from vit_suite.config import PretrainConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.evaluation.classification import Classification, classify
from vit_suite.methods.supervised import SupervisedViT
from vit_suite.reports.confusion import save_confusion
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone

log = logging.getLogger("vit_suite")


def class_names(data: ImageDataModule) -> list[str]:
    """The classes that a head has. UserError where training images have no labels."""
    labels = data.train_source.labels
    without = len(data.train_source) if labels is None else int((labels < 0).sum())
    if without:
        some = "has no labels" if labels is None else f"has no label for {without} of its {len(labels)} training images"
        raise UserError(
            f"{data.name} {some}, and supervised training needs one for each: sort the images into a folder a class"
            " (--data.name folder), or pretrain without labels first: vit-suite pretrain --method.name dino."
        )
    return data.classes


def check_test_labels(data: ImageDataModule) -> None:
    """UserError unless the scored split has labels (that they are of the classes trained on, the data sets see to)."""
    test = data.test_source
    if test.labels is None or not bool((test.labels >= 0).any()):
        raise UserError(
            f"split '{test.split}' of {data.name} has no labels to score: train without scores,"
            " --evaluate.every_epochs 0."
        )


def prepare_head(method: SupervisedViT, start: LoadedBackbone | None, checkpoint: Path | None) -> None:
    """Give the backbone the weights it starts from, unless the run resumes from `checkpoint`: then UserError unless the
    head there has the classes of the data."""
    if checkpoint is None:
        if start is not None:
            method.start_from(start.backbone)
        return
    before = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["hyper_parameters"]["classes"]
    if before != method.classes:
        names = next((f"; '{a}' was '{b}'" for a, b in zip(method.classes, before, strict=False) if a != b), "")
        raise UserError(
            f"cannot resume: the head of '{checkpoint}' has {len(before)} classes and the data"
            f" {len(method.classes)}{names}. Give the data it was trained on, or --run.overwrite to start anew."
        )


def has_test(data: ImageDataModule) -> bool:
    """Whether there is a labeled split besides the one that is trained on."""
    try:
        labels = data.test_source.labels
    except UserError:
        return False
    return not data.scored_on_itself and labels is not None and bool((labels >= 0).any())


def test_protocol(cfg: PretrainConfig, data: ImageDataModule, precision: str) -> dict[str, object]:
    """What decides the scores of `score_run` besides the weights."""
    start = cfg.method.start
    return {
        "split": data.test_source.split,
        "images": len(data.test()),
        "view": view_text([cfg.views.global_size] * 2),
        "precision": precision,
        "weights": "their average (EMA) after the last step" if cfg.method.ema else "those after the last step",
        "start": start,
        "start_sha256": load_backbone(start).sha256 if start else None,
    }


def score_run(
    cfg: PretrainConfig, method: SupervisedViT, data: ImageDataModule, precision: str, folder: Path
) -> dict[str, float]:
    """Scores of the whole test split, for results.json; `confusion.png` and `confusion.csv` in the run directory."""
    with distributed.apart():  # the run is over, and the other ranks have left
        scores = classify(method, data.test(), [cfg.views.global_size] * 2, cfg.evaluate.batch_size, precision)
    save_confusion(
        folder, scores.confusion, method.classes, f"{data.name}, top-1 {scores.top1:.2f}% of {scores.images} images"
    )
    log.info("%s", sentence(scores))
    return {
        "top1": scores.top1,
        "top5": scores.top5,
        "calibration_error": scores.calibration_error,
        "nll": scores.nll,
        "test_images": scores.images,
    }


def sentence(scores: Classification) -> str:
    """The scores in one line."""
    return (
        f"test: top-1 {scores.top1:.2f}%, top-5 {scores.top5:.2f}% of {scores.images} images, "
        f"calibration error {100 * scores.calibration_error:.2f}% (15 bins), NLL {scores.nll:.4f} nats"
    )
