"""What the commands that score a frozen backbone share: its images, the size they are seen at, the file for the
scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vit_suite.config import LocalizeConfig, ScoreConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.registry import open_test
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.models.build import check_image_size
from vit_suite.places import check_file
from vit_suite.reports.results import read_results
from vit_suite.weights.checkpoint import LoadedBackbone


def results_path(cfg: ScoreConfig | LocalizeConfig) -> Path:
    """The file the scores are appended to; UserError now, not after the work, when it cannot be."""
    folder = Path(cfg.checkpoint) if Path(cfg.checkpoint).is_dir() else Path()
    path = Path(cfg.output) if cfg.output else folder / "results.json"
    check_file("output", path)
    read_results(path)
    return path


def view_size(cfg: ScoreConfig, loaded: LoadedBackbone) -> list[int]:
    """[height, width] in pixels of the view that is scored."""
    size = [cfg.image_size, cfg.image_size] if cfg.image_size else loaded.image_size
    check_image_size(size, loaded.backbone.patch, "image_size")
    return list(size)


def open_data(cfg: ScoreConfig, loaded: LoadedBackbone, task: str) -> ImageDataModule:
    """The images of `cfg.data` with the channels that the backbone takes; UserError when they cannot be scored.

    Of the test split only the list of files and labels is read.
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
            " itself. Choose another split with data.train_split or data.test_split, or sort a folder into ROOT/train"
            " and ROOT/test."
        )
    if not _labeled(test):
        raise UserError(f"{test.title} has no labels to score against: choose another split with data.test_split.")
    return data


def _labeled(source: ImageSource) -> bool:
    return source.labels is not None and bool((source.labels >= 0).any())


def say_left_out(failures: list[str]) -> None:
    """One line below a score about the files that it was measured without; all are in the entry of results.json."""
    if failures:
        print(f"{len(failures)} files do not decode and are left out, listed in the entry; the first: {failures[0]}")
