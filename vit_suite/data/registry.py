"""Data sets by name: openers, statistics, and which split is trained on and which is scored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vit_suite.config import DataConfig, ImagesConfig
from vit_suite.data import files, published, shards
from vit_suite.data.pixels import Reading, parse_range
from vit_suite.data.published import open_published
from vit_suite.data.ranges import settle
from vit_suite.data.shapes import CLASSES as SHAPES
from vit_suite.data.shapes import ShapesSource
from vit_suite.data.source import ImageSource, stratified
from vit_suite.errors import UserError, counted, unknown_name
from vit_suite.files import locked

ROOT_VARIABLE = "VIT_SUITE_DATA"
LUMA = (0.299, 0.587, 0.114)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SHAPES_LENGTH = {"train": 10_000}
SHAPES_TEST_LENGTH = 2_000
SHAPES_SIDE = 32
"""Defaults of the generated set: images of a split, and their side in pixels."""
LEAST_STD = 1e-6
"""Smallest data.std: views divide by it."""

Opener = Callable[[DataConfig, Path, str | None], ImageSource]


@dataclass(frozen=True)
class DatasetInfo:
    """How a data set is opened, its RGB statistics in 0..1 (over all pixels of the training split), its number of
    classes."""

    open: Any
    """An `Opener`; None for generated images."""
    mean: list[float]
    std: list[float]
    classes: int | None = None  # None: whatever the files say
    download: bool = False  # torchvision can fetch it
    pattern: bool = False  # data.root may be a pattern of files, which the opener expands


# Statistics: CIFAR and STL-10 as commonly published for their training splits; Tiny-ImageNet likewise; the others use
# ImageNet's, as transfer papers do. `shapes`: measured over 3,000 images, std 0.213 at 32 px and 0.218 at 64 px.
DATASETS: dict[str, DatasetInfo] = {
    "cifar10": DatasetInfo(
        partial(open_published, published.CIFAR10), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], 10, True
    ),
    "cifar100": DatasetInfo(
        partial(open_published, published.CIFAR100), [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762], 100, True
    ),
    "stl10": DatasetInfo(
        partial(open_published, published.STL10), [0.4467, 0.4398, 0.4066], [0.2603, 0.2566, 0.2713], 10, True
    ),
    "flowers102": DatasetInfo(partial(open_published, published.FLOWERS102), *IMAGENET, 102, True),
    "food101": DatasetInfo(partial(open_published, published.FOOD101), *IMAGENET, 101, True),
    "oxford_pets": DatasetInfo(partial(open_published, published.OXFORD_PETS), *IMAGENET, 37, True),
    "imagenet": DatasetInfo(published.open_imagenet, *IMAGENET, 1000),
    "tiny_imagenet": DatasetInfo(files.open_tiny_imagenet, [0.4802, 0.4481, 0.3975], [0.2770, 0.2691, 0.2821], 200),
    "folder": DatasetInfo(files.open_folder, *IMAGENET),
    "flat": DatasetInfo(files.open_flat, *IMAGENET, 0),
    "list": DatasetInfo(files.open_list, *IMAGENET),
    "shards": DatasetInfo(shards.open_shards, *IMAGENET, pattern=True),
    "shapes": DatasetInfo(None, [0.6, 0.6, 0.6], [0.215, 0.215, 0.215], len(SHAPES)),
}


def dataset_info(name: str) -> DatasetInfo:
    """The entry of `DATASETS`; UserError with the nearest name when there is none."""
    if name not in DATASETS:
        raise unknown_name("data set (data.name)", name, DATASETS)
    return DATASETS[name]


def statistics(cfg: DataConfig) -> tuple[list[float], list[float]]:
    """Channel (means, standard deviations) in 0..1, `cfg.channels` values each.

    `cfg.mean` and `cfg.std` win; a single value stands for all channels. Else the data set's: for one channel the
    luma-weighted mean, and the luma-weighted std, which is exact for fully correlated channels (CIFAR-10: 0.2465,
    measured on the gray images 0.239). Any other number of channels has no published statistics: UserError asks for
    them, since a guess would train silently worse.
    """
    info = dataset_info(cfg.name)
    if cfg.channels < 1:
        raise UserError(f"data.channels is {cfg.channels}; expected 1 (gray), 3 (RGB) or another positive number.")
    return _values(cfg, "mean", info.mean), _values(cfg, "std", info.std)


def _values(cfg: DataConfig, key: str, known: list[float]) -> list[float]:
    given: list[float] | None = getattr(cfg, key)
    if given is None:
        if cfg.channels == 3:
            return list(known)
        if cfg.channels == 1:
            return [sum(weight * value for weight, value in zip(LUMA, known, strict=True))]
        raise UserError(
            f"data.channels {cfg.channels} has no published statistics: give data.{key} with {cfg.channels} values in"
            " 0..1 (or one for all; 0.5 is a usual choice)."
        )
    given = [float(value) for value in given]
    if len(given) == 1:
        given = given * cfg.channels
    if len(given) != cfg.channels:
        raise UserError(f"data.{key} has {len(given)} values, but data.channels is {cfg.channels}.")
    least = LEAST_STD if key == "std" else 0.0
    if not all(math.isfinite(value) and least <= value <= 1 for value in given):
        raise UserError(
            f"data.{key} is {given}; expected values {'above 0, at most 1' if key == 'std' else 'in 0..1'} (not"
            " 0..255)."
        )
    return given


def find_root(cfg: DataConfig) -> Path:
    """`data.root`, else $VIT_SUITE_DATA. UserError when neither is given or the folder is missing or empty."""
    given = cfg.root or os.environ.get(ROOT_VARIABLE)
    if not given:
        raise UserError(
            f"data set '{cfg.name}' needs a folder: set data.root, or the environment variable {ROOT_VARIABLE}."
        )
    root = Path(given).expanduser()
    origin = "data.root" if cfg.root else f"${ROOT_VARIABLE}"
    info = dataset_info(cfg.name)
    can_fetch = info.download
    if cfg.download and can_fetch:
        return root
    how = " data.download=true fetches the set." if can_fetch else ""
    if not root.exists() and not info.pattern:
        expected = f"set data.root, or the environment variable {ROOT_VARIABLE}, to the folder of the data"
        raise UserError(f"{origin} '{root}' does not exist: {expected}.{how}")
    if root.is_dir() and not any(os.scandir(root)):
        raise UserError(f"{origin} '{root}' is empty; data set '{cfg.name}' expects its files there.{how}")
    if root.is_file() and cfg.name != "list" and not info.pattern:
        raise UserError(f"{origin} '{root}' is a file; data set '{cfg.name}' expects a folder.")
    return root


def open_split(cfg: DataConfig, split: str | None, seed: int = 0) -> ImageSource:
    """The whole of one split, un-augmented; `split` None is the one to score (test, else val). Nothing is decoded yet.

    `seed` matters for `shapes` alone. UserError for an unknown name, a missing, empty or wrong root, an absent split.
    """
    info = dataset_info(cfg.name)
    if info.open is None:
        split = files.ALIASES.get(split or "test", split or "test")
        if split not in files.SPLITS:
            raise UserError(f"shapes has no split '{split}'; it has {', '.join(files.SPLITS)}.")
        length = cfg.length if split == cfg.train_split else cfg.test_length
        if length is None:
            length = SHAPES_LENGTH.get(split, SHAPES_TEST_LENGTH)
        side = cfg.image_size or SHAPES_SIDE
        return ShapesSource(split, length, (side, side), cfg.channels, seed)
    try:
        root = find_root(cfg)
        with _one_downloads(root) if cfg.download and info.download else nullcontext():
            if cfg.holdout:
                return _held_out(cfg, info, root, split)
            source = info.open(cfg, root, split)
        train = None if split == cfg.train_split else partial(info.open, cfg, root, cfg.train_split)
        return set_reading(source, cfg, train)
    except PermissionError as error:
        raise UserError(f"data set '{cfg.name}': no permission to read '{error.filename}'.") from None


def _held_out(cfg: DataConfig, info: DatasetInfo, root: Path, split: str | None) -> ImageSource:
    """The train or the test part of a set without a test split, as `data.holdout` divides it. The parts share no image,
    and each class has the same share of both. UserError if the set has a split of its own to score, or is too small."""
    whole = info.open(cfg, root, "train")
    try:
        own = info.open(cfg, root, None).split
    except UserError:  # it has only a train split
        own = whole.split
    if own != whole.split:
        raise UserError(f"data.holdout is for a set without a split to score; {whole.name} has '{own}'.")
    split = files.ALIASES.get(split or "test", split or "test")
    if split not in ("train", "test"):
        raise UserError(f"{whole.name} with data.holdout has the splits train and test, not '{split}'.")
    set_reading(whole, cfg)
    count = round(cfg.holdout * len(whole))
    if not 0 < count < len(whole):
        raise UserError(
            f"data.holdout {cfg.holdout:g} of {counted(len(whole), 'image')} of {whole.name} leaves a split empty."
        )
    held = stratified(whole.labels, len(whole), count, cfg.holdout_seed)
    rest = torch.ones(len(whole), dtype=torch.bool)
    rest[held] = False
    part = whole.subset(rest.nonzero().squeeze(1) if split == "train" else held)
    part.split = split
    return part


def set_reading(source: ImageSource, cfg: ImagesConfig, train: Callable[[], ImageSource] | None = None) -> ImageSource:
    """`source`, whose files are read as `cfg` says. `train`: see `ranges.settle`."""
    source.reading = Reading(parse_range(cfg.value_range), cfg.max_pixels, cfg.frame)
    settle(source, train)
    return source


def _one_downloads(root: Path) -> AbstractContextManager:
    """A lock for a download into `root`: one process fetches the set, others wait and then find it there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:  # the opener says what is wrong with it
        return nullcontext()
    return locked(root / ".download.lock") if os.access(root, os.W_OK) else nullcontext()


def open_train(cfg: DataConfig, seed: int = 0) -> ImageSource:
    """`data.train_split`, cut to `data.length` class by class."""
    return _limited(open_split(cfg, cfg.train_split, seed), cfg.length, "data.length", seed)


def open_test(cfg: DataConfig, seed: int = 0) -> ImageSource:
    """`data.test_split` (the set's own test, else val, when not given), cut to `data.test_length` class by class."""
    return _limited(open_split(cfg, cfg.test_split, seed), cfg.test_length, "data.test_length", seed)


def _limited(source: ImageSource, length: int | None, key: str, seed: int) -> ImageSource:
    if length is not None and length < 1:
        raise UserError(f"{key} is {length}; expected at least 1.")
    if length is None or length >= len(source):
        return source
    return source.subset(stratified(source.labels, len(source), length, seed))
