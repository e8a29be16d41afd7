"""What the scores of a frozen backbone share: their images, and the size at which the backbone sees them."""

from __future__ import annotations

from dataclasses import replace

from vit_suite.config import ScoreConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.registry import open_test
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.models.build import check_image_size
from vit_suite.weights.checkpoint import LoadedBackbone


def view_size(cfg: ScoreConfig, loaded: LoadedBackbone) -> list[int]:
    """[height, width] in pixels of the center crop that the backbone sees. UserError when patches do not divide it."""
    size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
    check_image_size(size, loaded.backbone.patch, "image_size")
    return list(size)


def open_scored(cfg: ScoreConfig, loaded: LoadedBackbone, task: str) -> ImageDataModule:
    """The images of `cfg.data` with the channels that the backbone takes. UserError when they cannot be scored.

    task: its name in messages, such as "kNN". Of the test split only the list of files and labels is read.
    """
    channels = loaded.backbone.cfg.channels
    options = replace(cfg.data.whole(channels), batch_size=1)  # no training: one image fills a batch
    if channels not in (1, 3):  # no data set has published statistics for these
        options = replace(options, mean=options.mean or loaded.mean, std=options.std or loaded.std)
    data = ImageDataModule(options, seed=cfg.seed)
    if not _labeled(data.train_source):
        raise UserError(
            f"{data.name} has no labels, and {task} needs some: score on class folders or another labeled data set."
        )
    test = open_test(options, cfg.seed)
    if test.split == data.train_source.split:
        raise UserError(
            f"{data.name} would be scored on the images that it learns from, split '{test.split}': each would find"
            " itself. Hold a share of each class out with --data.holdout 0.2, sort a folder into ROOT/train and"
            " ROOT/test, or choose another split with data.train_split or data.test_split."
        )
    if not _labeled(test):
        raise UserError(f"{test.title} has no labels to score against: choose another split with data.test_split.")
    return data


def _labeled(source: ImageSource) -> bool:
    return source.labels is not None and bool((source.labels >= 0).any())
