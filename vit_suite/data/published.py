"""Published data sets, read and downloaded by torchvision's own classes; or, where the root holds them so, as class
folders of files.

Every opener takes `(cfg, root, split)` and returns an `ImageSource`. torchvision's many ways to fail (RuntimeError,
FileNotFoundError, EOFError, pickle errors, network errors) all become one UserError with the expected layout and how to
get the set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_suite.config import DataConfig
from vit_suite.data.files import choose_split, class_folder_source, split_folders
from vit_suite.data.listing import found_in, subfolders
from vit_suite.data.source import ArraySource, FileSource, ImageSource
from vit_suite.errors import UserError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Published(NamedTuple):
    """A set that torchvision reads from a folder of ROOT."""

    title: str
    folder: str
    """Name of the folder."""
    holds: str
    """What is in it, for messages."""
    classes: int
    splits: tuple[str, ...]
    read: Callable[[Any, Path, str, bool], Any]
    """(torchvision.datasets, ROOT, split, download) -> torchvision's data set."""
    images: str
    """Attribute of torchvision's data set that holds the images: a uint8 array, or the paths of files."""
    labels: str
    names: list[str] | None = None
    """Class names that class folders must have to be taken for this set."""
    aliases: Mapping[str, str] = {}
    """Other names of splits."""


CIFAR10 = Published(
    "CIFAR-10",
    "cifar-10-batches-py",
    "(the pickled batches)",
    10,
    ("train", "test"),
    lambda tv, root, split, download: tv.CIFAR10(root, train=split == "train", download=download),
    "data",
    "targets",
    CIFAR10_CLASSES,
)
CIFAR100 = CIFAR10._replace(
    title="CIFAR-100",
    folder="cifar-100-python",
    classes=100,
    read=lambda tv, root, split, download: tv.CIFAR100(root, train=split == "train", download=download),
    names=None,
)
"""With its 100 fine labels."""
STL10 = Published(
    "STL-10",
    "stl10_binary",
    "*.bin",
    10,
    ("train", "test", "unlabeled", "train+unlabeled"),
    lambda tv, root, split, download: tv.STL10(root, split=split, download=download),
    "data",
    "labels",
)
"""5,000, 8,000, 100,000 and 105,000 images; the label is -1 where there is none."""
FLOWERS102 = Published(
    "Flowers-102",
    "flowers-102",
    "with jpg/, imagelabels.mat and setid.mat",
    102,
    ("train", "val", "test"),
    lambda tv, root, split, download: tv.Flowers102(root, split=split, download=download),
    "_image_files",
    "_labels",
)
"""1,020, 1,020 and 6,149 images. torchvision reads its .mat files with scipy."""
FOOD101 = Published(
    "Food-101",
    "food-101",
    "with images/ and meta/",
    101,
    ("train", "test"),
    lambda tv, root, split, download: tv.Food101(root, split=split, download=download),
    "_image_files",
    "_labels",
)
"""75,750 and 25,250 images."""
OXFORD_PETS = Published(
    "Oxford Pets",
    "oxford-iiit-pet",
    "with images/ and annotations/",
    37,
    ("train", "test"),
    lambda tv, root, split, download: tv.OxfordIIITPet(
        root, split="trainval" if split == "train" else split, download=download
    ),
    "_images",
    "_labels",
    aliases={"trainval": "train"},
)
"""37 breeds; its trainval (3,680 images) is train here, and 3,669 are test."""


def open_published(what: Published, cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """One split of a published set: as torchvision reads it, or as class folders."""
    split = what.aliases.get(split or "", split)
    root, found = _place(cfg, root, split, what)
    if found is not None:
        return found
    chosen = choose_split(split, what.splits, what.title)
    folders = f"ROOT/{cfg.name}/{{{','.join(what.splits[:3])}}}/CLASS/*.jpg"
    layout = f"ROOT/{what.folder}/ {what.holds}, or {folders}"
    data = _read(cfg, root, what.title, layout, lambda tv: what.read(tv, root, chosen, cfg.download))
    images, labels = getattr(data, what.images), np.asarray(getattr(data, what.labels)).astype(np.int64)
    if not isinstance(images, np.ndarray):
        return _files(cfg, what.title, chosen, root, images, data.classes, labels)
    if images.shape[-1] == 3:  # CIFAR's are (N, H, W, C), STL-10's (N, C, H, W)
        images = images.transpose(0, 3, 1, 2)
    names = getattr(data, "classes", None) or [str(number) for number in range(what.classes)]
    return ArraySource(what.title, chosen, images, cfg.channels, names, None if (labels < 0).all() else labels)


def open_imagenet(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """ImageNet-1k: train and val as WNID folders. Classes have words with torchvision's meta.bin (or the devkit
    archive)."""
    layout = (
        "ROOT/train/WNID/*.JPEG and ROOT/val/WNID/*.JPEG (val sorted into class folders), or ROOT with"
        " ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which torchvision unpacks"
    )
    for place in (root, root / "imagenet", root / "ILSVRC2012", root / "ILSVRC" / "Data" / "CLS-LOC"):
        if split_folders(place) or (place / "ILSVRC2012_devkit_t12.tar.gz").is_file():
            root = place
            break
    chosen = choose_split(split, ("train", "val"), "ImageNet")
    if any((root / name).is_file() for name in ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")):
        data = _read(cfg, root, "ImageNet", layout, lambda tv: tv.ImageNet(root, split=chosen))
        paths, labels = zip(*data.samples, strict=True)
        return _files(cfg, "ImageNet", chosen, root, paths, [words[0] for words in data.classes], labels)
    folder = split_folders(root).get(chosen)
    if folder is None or not subfolders(folder):
        found = f"expected {layout}; found {found_in(folder or root)}"
        raise UserError(f"no ImageNet {chosen} split under '{root}': {found}. It needs an image-net.org account.")
    return class_folder_source("ImageNet", chosen, folder, cfg.channels)


def _place(cfg: DataConfig, root: Path, split: str | None, what: Published) -> tuple[Path, ImageSource | None]:
    """(parent of torchvision's folder, None), or (folder, source) if ROOT holds the set as class folders.

    ROOT may be the parent of that folder, or the folder itself. Class folders are looked for in ROOT/NAME and in ROOT.
    They must have the set's number of classes (and its `names`, if given), so that no other set is taken for this one.
    """
    title, folder = what.title, what.folder
    if root.name == folder and not (root / folder).is_dir():
        return root.parent, None
    for place in (root, root / cfg.name):
        if (place / folder).is_dir():
            return place, None
    for place in (root / cfg.name, root / title.lower(), root):
        splits = split_folders(place)
        found = subfolders(splits["train"]) if "train" in splits else []
        if len(found) == what.classes and what.names in (None, found):
            chosen = choose_split(split, splits, f"'{place}'")
            source = class_folder_source(title, chosen, splits[chosen], cfg.channels, found)
            kind = os.path.splitext(source.path(0))[1].lstrip(".").upper()
            source.name = f"{title} ({'JPEG' if kind in ('JPG', 'JPEG') else kind})"
            return place, source
    return root, None


def _read(cfg: DataConfig, root: Path, title: str, layout: str, make: Callable[[Any], Any]) -> Any:
    """Call torchvision, and turn whatever it raises into one UserError."""
    from torchvision import datasets

    try:
        return make(datasets)
    except ImportError as error:
        module = error.name or "it"
        raise UserError(
            f"{title}: torchvision reads this set with {module}, which is missing: pip install {module}."
        ) from None
    except Exception as error:
        how = "" if cfg.download or title == "ImageNet" else " data.download=true fetches it."
        cause = " ".join(str(error).split())
        cause = "" if "download=True" in cause else f" ({type(error).__name__}: {cause[:200]})"
        did = "could not be downloaded to" if cfg.download else "not found, or damaged, under"
        raise UserError(f"{title} {did} '{root}'{cause}: expected {layout}; found {found_in(root)}.{how}") from None


def _files(cfg: DataConfig, title: str, split: str, root: Path, paths: Any, classes: Any, labels: Any) -> FileSource:
    relative = [os.path.relpath(path, root) for path in paths]
    if not relative:
        raise UserError(f"{title} {split} under '{root}' lists no images.")
    return FileSource(title, split, root, relative, cfg.channels, classes, list(labels))
