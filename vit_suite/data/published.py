"""Published data sets, read and downloaded by torchvision's own classes; or, where the root holds them so, as class
folders of files.

Every opener takes `(cfg, root, split)` and returns an `ImageSource`. torchvision's many ways to fail (RuntimeError,
FileNotFoundError, EOFError, pickle errors, network errors) all become one UserError with the expected layout and how to
get the set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_suite.config import DataConfig
from vit_suite.data.files import choose_split, class_folder_source, split_folders
from vit_suite.data.listing import found_in, subfolders
from vit_suite.data.source import ArraySource, FileSource, ImageSource
from vit_suite.errors import UserError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def open_cifar10(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """CIFAR-10: the pickled batches (torchvision), or class folders."""
    return _open_cifar(cfg, root, split, "CIFAR10", "CIFAR-10", "cifar-10-batches-py", 10)


def open_cifar100(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """CIFAR-100 with its 100 fine labels."""
    return _open_cifar(cfg, root, split, "CIFAR100", "CIFAR-100", "cifar-100-python", 100)


def _open_cifar(
    cfg: DataConfig, root: Path, split: str | None, cls: str, title: str, folder: str, classes: int
) -> ImageSource:
    names = CIFAR10_CLASSES if classes == 10 else None
    root, found = _place(cfg, root, split, title, folder, classes, names)
    if found is not None:
        return found
    chosen = choose_split(split, ("train", "test"), title)
    layout = f"ROOT/{folder}/ (the pickled batches), or ROOT/{cfg.name}/{{train,test}}/CLASS/*.jpg"
    data = _read(
        cfg, root, title, layout, lambda tv: getattr(tv, cls)(root, train=chosen == "train", download=cfg.download)
    )
    return ArraySource(title, chosen, data.data.transpose(0, 3, 1, 2), cfg.channels, data.classes, data.targets)


def open_stl10(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """STL-10: train (5,000), test (8,000), unlabeled (100,000), train+unlabeled; label -1 where there is none."""
    root, found = _place(cfg, root, split, "STL-10", "stl10_binary", 10)
    if found is not None:
        return found
    chosen = choose_split(split, ("train", "test", "unlabeled", "train+unlabeled"), "STL-10")
    layout = f"ROOT/stl10_binary/*.bin, or ROOT/{cfg.name}/{{train,test}}/CLASS/*.jpg"
    data = _read(cfg, root, "STL-10", layout, lambda tv: tv.STL10(root, split=chosen, download=cfg.download))
    labels = np.asarray(data.labels).astype(np.int64)
    names = getattr(data, "classes", None) or [str(i) for i in range(10)]
    return ArraySource("STL-10", chosen, data.data, cfg.channels, names, None if (labels < 0).all() else labels)


def open_flowers102(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """Oxford 102 Flowers: train (1,020), val (1,020), test (6,149). torchvision reads its .mat files with scipy."""
    root, found = _place(cfg, root, split, "Flowers-102", "flowers-102", 102)
    if found is not None:
        return found
    chosen = choose_split(split, ("train", "val", "test"), "Flowers-102")
    layout = (
        f"ROOT/flowers-102/ with jpg/, imagelabels.mat and setid.mat, or ROOT/{cfg.name}/{{train,val,test}}/CLASS/*.jpg"
    )
    data = _read(cfg, root, "Flowers-102", layout, lambda tv: tv.Flowers102(root, split=chosen, download=cfg.download))
    return _files(cfg, "Flowers-102", chosen, root, data._image_files, data.classes, data._labels)


def open_food101(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """Food-101: train (75,750), test (25,250)."""
    root, found = _place(cfg, root, split, "Food-101", "food-101", 101)
    if found is not None:
        return found
    chosen = choose_split(split, ("train", "test"), "Food-101")
    layout = f"ROOT/food-101/ with images/ and meta/, or ROOT/{cfg.name}/{{train,test}}/CLASS/*.jpg"
    data = _read(cfg, root, "Food-101", layout, lambda tv: tv.Food101(root, split=chosen, download=cfg.download))
    return _files(cfg, "Food-101", chosen, root, data._image_files, data.classes, data._labels)


def open_oxford_pets(cfg: DataConfig, root: Path, split: str | None) -> ImageSource:
    """Oxford-IIIT Pets, 37 breeds: train (its trainval, 3,680), test (3,669)."""
    root, found = _place(cfg, root, split, "Oxford Pets", "oxford-iiit-pet", 37)
    if found is not None:
        return found
    chosen = "train" if split == "trainval" else choose_split(split, ("train", "test"), "Oxford Pets")
    layout = f"ROOT/oxford-iiit-pet/ with images/ and annotations/, or ROOT/{cfg.name}/{{train,test}}/CLASS/*.jpg"
    part = "trainval" if chosen == "train" else "test"
    data = _read(cfg, root, "Oxford Pets", layout, lambda tv: tv.OxfordIIITPet(root, split=part, download=cfg.download))
    return _files(cfg, "Oxford Pets", chosen, root, data._images, data.classes, data._labels)


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


def _place(
    cfg: DataConfig,
    root: Path,
    split: str | None,
    title: str,
    folder: str,
    classes: int,
    names: list[str] | None = None,
) -> tuple[Path, ImageSource | None]:
    """Where torchvision's `folder` lies (ROOT is its parent, or the folder itself); the source if ROOT holds class
    folders.

    Class folders are looked for in ROOT/NAME and in ROOT, and must have the set's number of classes (and its `names`,
    if given), lest another set goes by this one's name.
    """
    if root.name == folder and not (root / folder).is_dir():
        return root.parent, None
    for place in (root, root / cfg.name):
        if (place / folder).is_dir():
            return place, None
    for place in (root / cfg.name, root / title.lower(), root):
        splits = split_folders(place)
        found = subfolders(splits["train"]) if "train" in splits else []
        if len(found) == classes and (names is None or found == names):
            chosen = choose_split("train" if split == "trainval" else split, splits, f"'{place}'")
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
