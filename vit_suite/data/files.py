"""Data sets that are folders or lists of image files: `folder`, `flat`, `list`, and Tiny-ImageNet's own layout.

Every opener takes `(cfg, root, split)` and returns an `ImageSource`, or raises one UserError that says what was
expected and what was found. `split` None means "the one to score": test, else val, else the only one there is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from vit_suite.config import DataConfig
from vit_suite.data.decode import is_image
from vit_suite.data.listing import Listing, found_in, say_once, subfolders, walk_images
from vit_suite.data.lists import read_list
from vit_suite.data.source import FileSource
from vit_suite.errors import UserError, counted, nearest, short
from vit_suite.files import printable

SPLITS = ("train", "val", "test")
ALIASES = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}
WHOLE = "all"  # the name of the split where a set has no splits


def class_names(folder: Path) -> list[str]:
    """The names that `class_files` finds, without listing every image."""
    names, seen = [], set()
    for name in subfolders(folder):
        real = os.path.realpath(folder / name)
        if real not in seen and next(Listing(folder).walk(name), None) is not None:
            names.append(name)
        seen.add(real)
    return names


def split_folders(root: Path) -> dict[str, Path]:
    """Split (train, val, test) -> its folder, for the folders of `root` that have the name of a split."""
    found: dict[str, Path] = {}
    for name in subfolders(root):
        split = ALIASES.get(name.lower(), name.lower())
        if split in SPLITS:
            found.setdefault(split, root / name)
    return found


def choose_split(split: str | None, available: Iterable[str], where: str, key: str = "data.test_split") -> str:
    """`split` if it is among `available`; for None the one to score. UserError, with those available, if there is
    none."""
    available = list(available)
    if split is None:
        for candidate in ("test", "val"):
            if candidate in available:
                return candidate
        if available == [WHOLE]:
            return WHOLE
        raise UserError(
            f"{where} has no split to score: expected test or val, found {', '.join(available)}. Name one with {key}."
        )
    wanted = ALIASES.get(split, split)
    if wanted in available:
        return wanted
    if available == [WHOLE]:
        raise UserError(f"{where} has no split '{split}': hold a share out for it with --data.holdout 0.2.")
    raise UserError(f"{where} has no split '{split}'.{nearest(split, available)} Splits found: {', '.join(available)}.")


class Classes(NamedTuple):
    """`folder/CLASS/**/image`."""

    names: list[str]
    """Folders that hold images, as the disk has them, sorted."""
    paths: list[str]
    """Relative to the folder, class by class."""
    labels: list[int]
    empty: list[str]
    """Folders without an image that is read."""
    listing: Listing


def class_files(folder: Path) -> Classes:
    """The class folders of `folder`. Folders that this suite wrote are no classes."""
    found = Classes([], [], [], [], Listing(folder))
    for name in subfolders(folder):
        explained = len(found.listing.outputs) + len(found.listing.twice) + len(found.listing.failures)
        files = list(found.listing.walk(name))
        if files:
            found.paths.extend(files)
            found.labels.extend([len(found.names)] * len(files))
            found.names.append(name)
        elif explained == len(found.listing.outputs) + len(found.listing.twice) + len(found.listing.failures):
            found.empty.append(name)
    return found


def class_folder_source(
    name: str, split: str, folder: Path, channels: int, classes: list[str] | None = None
) -> FileSource:
    """Class folders as a source. `classes`: folders of the training split, so that labels agree where a split lacks a
    class. Names of classes are `printable`."""
    found = class_files(folder)
    title = f"{name} {split}"
    loose = sum(is_image(entry.name) for entry in os.scandir(folder))
    found.listing.say(title)
    if not found.paths or loose > len(found.paths):
        expected = f"expected {folder}/CLASS/image.jpg, found {found_in(folder)}"
        hint = f", {loose} images directly in it; for unlabeled images use data.name flat" if loose else ""
        few_images = f"only {counted(len(found.paths), 'image')} in class folders"
        what = few_images if found.paths else "no class folders with images"
        raise UserError(f"{what} in '{folder}': {expected}{hint}.")
    if loose:
        say_once(f"{title}: {loose} images directly in '{folder}' belong to no class and are left out")
    if found.empty:
        say_once(
            f"{title}: {len(found.empty)} folders hold no image that is read, and are no classes: {few(found.empty)}"
        )
    labels = torch.tensor(found.labels)
    if classes is not None and found.names != classes:
        unknown = [one for one in found.names if one not in classes]
        if unknown:
            raise UserError(
                f"'{folder}' has {counted(len(unknown), 'class')} that the train split lacks: {few(unknown)}; there"
                " their folders are missing, or hold no image that is read."
            )
        labels = torch.tensor([classes.index(one) for one in found.names])[labels]
    shown = [printable(one) for one in (found.names if classes is None else classes)]
    source = FileSource(name, split, folder, found.paths, channels, shown, labels)
    source.failures = found.listing.failures
    return source


def few(names: list[str]) -> str:
    """The first five names for a message."""
    return ", ".join(short(printable(name)) for name in names[:5]) + (", ..." if len(names) > 5 else "")


def open_folder(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`folder`: ROOT/{train,val,test}/CLASS/image; or ROOT/CLASS/image, one split `all` that is trained on and
    scored."""
    _need_folder(root, "folder", "ROOT/train/CLASS/image.jpg, or ROOT/CLASS/image.jpg")
    name = root.resolve().name
    splits = split_folders(root)
    if not splits:
        # The default, train, means "whatever there is to train on"; a name that the user gave must be there.
        chosen = (
            WHOLE
            if split in (None, "train")
            else choose_split(split, [WHOLE], f"'{root}' (class folders without splits)")
        )
        return class_folder_source(name, chosen, root, cfg.channels)
    chosen = choose_split(split, sorted(splits, key=SPLITS.index), f"'{root}'")
    classes = None
    if chosen != "train" and "train" in splits:
        classes = class_names(splits["train"])
    return class_folder_source(name, chosen, splits[chosen], cfg.channels, classes)


def open_flat(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`flat`: every image under ROOT, unlabeled; a folder named like the asked split is taken if there is one."""
    _need_folder(root, "flat", "any tree of image files")
    splits = split_folders(root)
    if splits and split is not None and ALIASES.get(split, split) in splits:
        root, chosen = splits[ALIASES.get(split, split)], split
    else:
        chosen = WHOLE if split in (None, "train") else choose_split(split, [*splits, WHOLE], f"'{root}'")
    listing = Listing(root)
    paths = list(listing.walk())
    listing.say(f"{root.resolve().name} {chosen}")
    if not paths:
        raise UserError(f"no images under '{root}': expected files such as .jpg or .png, found {found_in(root)}.")
    source = FileSource(root.resolve().name, chosen, root, paths, cfg.channels)
    source.failures = listing.failures
    return source


def open_list(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`list`: a text file of `path`, `path<TAB>label` or `path label`, a CSV with named columns (`filename,species`),
    or a folder with SPLIT.txt or SPLIT.csv files of that kind."""
    file, chosen = root, WHOLE
    lists: dict[str, Path] = {}
    if root.is_dir():
        for entry in sorted([*root.glob("*.csv"), *root.glob("*.txt")]):
            lists[ALIASES.get(entry.stem.lower(), entry.stem.lower())] = entry
        lists = {name: entry for name, entry in lists.items() if name in SPLITS}
        if not lists:
            raise UserError(
                f"data.root '{root}' is a folder without train.txt, val.txt or test.txt (or .csv); found"
                f" {found_in(root)}."
            )
        chosen = choose_split(split, lists, f"'{root}'")
        file = lists[chosen]
    elif split not in (None, "train", WHOLE):
        choose_split(split, [WHOLE], f"the list '{root}'")
    paths, words = read_list(file)
    base = file.resolve().parent
    if not any(os.path.exists(base / path) for path in paths[:100]):
        tried = f"none of the first {counted(min(100, len(paths)), 'path')} in '{file}' exists"
        raise UserError(f"{tried}; relative ones are looked up in '{base}'. First: {short(printable(paths[0]))}")
    known = {word for word in words if word is not None}
    if not known:
        return FileSource(file.stem, chosen, base, paths, cfg.channels)
    if chosen != "train" and "train" in lists:
        trained = {word for word in read_list(lists["train"])[1] if word is not None}
        if trained and known - trained:  # new classes would shift the numbers of the others
            raise UserError(
                f"'{file}' has {counted(len(known - trained), 'class')} that {lists['train'].name} lacks:"
                f" {', '.join(sorted(known - trained)[:5])}."
            )
        known |= trained
    classes = sorted(known, key=lambda word: (0, int(word), word) if re.fullmatch(r"\d{1,18}", word) else (1, 0, word))
    number = {word: i for i, word in enumerate(classes)}
    labels = [-1 if word is None else number[word] for word in words]
    return FileSource(file.stem, chosen, base, paths, cfg.channels, [printable(word) for word in classes], labels)


def open_tiny_imagenet(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """Tiny-ImageNet as distributed: train/WNID/images with WNID_boxes.txt, val/images with val_annotations.txt,
    wnids.txt.

    ROOT is the set itself, or a folder that holds it in `tiny-imagenet-*`. The test split has no public labels and is
    left out: val is scored. Boxes in the files name the first and the last pixel; here the end is exclusive. Class
    names come from words.txt.
    """
    expected = (
        "wnids.txt, train/WNID/images/*.JPEG and val/val_annotations.txt in ROOT or in a tiny-imagenet-* folder in ROOT"
    )
    _need_folder(root, "tiny_imagenet", expected)
    inside = sorted(path for path in root.iterdir() if re.match(r"tiny[-_]imagenet", path.name, re.IGNORECASE))
    places = [path for path in [root, *inside] if (path / "wnids.txt").is_file()]
    if not places:
        url = "https://cs231n.stanford.edu/tiny-imagenet-200.zip"
        raise UserError(
            f"no Tiny-ImageNet under '{root}': expected {expected}; found {found_in(root)}. It is at {url}."
        )
    root = places[0]
    wnids = (root / "wnids.txt").read_text().split()
    splits = [name for name in ("train", "val") if (root / name).is_dir()]
    chosen = choose_split(split, splits, f"'{root}'")
    names = {}
    if (root / "words.txt").is_file():
        lines = (line.rstrip("\n").split("\t", 1) for line in open(root / "words.txt", encoding="utf-8"))
        names = {parts[0]: parts[1].split(",")[0] for parts in lines if len(parts) == 2}
    rows = list(_tiny_train(root, wnids) if chosen == "train" else _tiny_val(root, wnids))
    if not rows:
        raise UserError(
            f"the {chosen} split of '{root}' holds no images: expected {expected}; found {found_in(root / chosen)}."
        )
    paths, labels, boxes = zip(*rows, strict=True)
    # Distinct WNIDs can share a first word ("cardigan"): those keep their number, so that class names stay distinct.
    plain = [names.get(wnid, wnid) for wnid in wnids]
    classes = [word if plain.count(word) == 1 else f"{word} ({wnid})" for wnid, word in zip(wnids, plain, strict=True)]
    name = "Tiny-ImageNet" if len(wnids) == 200 else f"Tiny-ImageNet ({counted(len(wnids), 'class')})"
    return FileSource(
        name, chosen, root, paths, cfg.channels, classes, labels, torch.tensor(boxes, dtype=torch.float32)
    )


def _tiny_train(root: Path, wnids: list[str]) -> Iterator[tuple[str, int, list[float]]]:
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid
        if not (folder / "images").is_dir():
            raise UserError(f"'{folder / 'images'}' is missing, but wnids.txt names {wnid}.")
        file = folder / f"{wnid}_boxes.txt"
        boxes = dict(_box_line(line, file, 5) for line in file.read_text().splitlines()) if file.is_file() else {}
        for path in walk_images(root, os.path.join("train", wnid, "images")):
            yield path, label, boxes.get(os.path.basename(path), [float("nan")] * 4)


def _tiny_val(root: Path, wnids: list[str]) -> Iterator[tuple[str, int, list[float]]]:
    file = root / "val" / "val_annotations.txt"
    if not file.is_file():
        raise UserError(f"'{file}' is missing; found {found_in(root / 'val')}.")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    for line in file.read_text().splitlines():
        fields = line.split()
        if len(fields) != 6 or fields[1] not in number:
            raise UserError(
                f"'{file}': expected `name WNID x0 y0 x1 y1` with a WNID of wnids.txt, found '{line[:80]}'."
            )
        name, box = _box_line(" ".join([fields[0], *fields[2:]]), file, 5)
        yield os.path.join("val", "images", name), number[fields[1]], box


def _box_line(line: str, file: Path, fields: int) -> tuple[str, list[float]]:
    words = line.split()
    try:
        x0, y0, x1, y1 = map(float, words[1:])
    except ValueError:
        raise UserError(f"'{file}': expected `name x0 y0 x1 y1`, found '{line[:80]}'.") from None
    return words[0], [x0, y0, x1 + 1, y1 + 1]


def _need_folder(root: Path, name: str, expected: str) -> None:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"data.root '{root}' {what}; {name} expects {expected}.")
    if not any(os.scandir(root)):
        raise UserError(f"data.root '{root}' is empty; {name} expects {expected}.")
