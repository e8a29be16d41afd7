"""Data sets that are folders or lists of image files: `folder`, `flat`, `list`, and Tiny-ImageNet's own layout.

Every opener takes `(cfg, root, split)` and returns an `ImageSource`, or raises one UserError that says what was
expected and what was found. `split` None means "the one to score": test, else val, else the only one there is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from vit_suite.config import DataConfig
from vit_suite.data.decode import is_image
from vit_suite.data.source import FileSource
from vit_suite.errors import UserError, nearest

SPLITS = ("train", "val", "test")
ALIASES = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}
WHOLE = "all"  # the name of the split where a set has no splits


def found_in(root: Path, shown: int = 4) -> str:
    """What a folder holds, for messages: "3 folders (a, b, c) and 12 files (x.txt, ...)"."""
    if not root.exists():
        return "nothing (it does not exist)"
    if root.is_file():
        return "a file"
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    parts = []
    for kind, names in (
        ("folder", [e.name for e in entries if e.is_dir()]),
        ("file", [e.name for e in entries if not e.is_dir()]),
    ):
        if names:
            more = ", ..." if len(names) > shown else ""
            parts.append(f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:shown])}{more})")
    return " and ".join(parts) or "nothing (it is empty)"


def subfolders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted, hidden ones left out."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def walk_images(root: str | os.PathLike, below: str = "") -> Iterator[str]:
    """Paths of image files under `root`, relative to it, in sorted order; links to folders are followed once each."""
    seen: set[tuple[int, int]] = set()

    def walk(below: str) -> Iterator[str]:
        here = os.path.join(os.fspath(root), below)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            return
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        for entry in entries:
            path = os.path.join(below, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(path)
            elif is_image(entry.name):
                yield path

    yield from walk(below)


def has_image(root: Path) -> bool:
    """Whether there is at least one image file under `root`; stops at the first."""
    return root.is_dir() and next(walk_images(root), None) is not None


def split_folders(root: Path) -> dict[str, Path]:
    """Canonical split name -> folder, for the folders of `root` that are named like splits."""
    found = {}
    for name in subfolders(root):
        split = ALIASES.get(name.lower(), name.lower())
        if split in SPLITS:
            found.setdefault(split, root / name)
    return found


def choose_split(split: str | None, available: Iterable[str], where: str, key: str = "data.test_split") -> str:
    """The split itself if it is there; for None the one to score. UserError names those that are."""
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
    raise UserError(f"{where} has no split '{split}'.{nearest(split, available)} Splits found: {', '.join(available)}.")


def class_files(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """`folder/CLASS/**/image` -> class names (sorted), paths relative to `folder`, labels. A class is a folder with
    images."""
    classes: list[str] = []
    paths: list[str] = []
    labels: list[int] = []
    for name in subfolders(folder):
        files = list(walk_images(folder, name))
        if files:
            paths += files
            labels += [len(classes)] * len(files)
            classes.append(name)
    return classes, paths, labels


def class_folder_source(
    name: str, split: str, folder: Path, channels: int, classes: list[str] | None = None
) -> FileSource:
    """Class folders as a source. `classes`: those of the training split, so that labels agree where a split lacks a
    class."""
    found, paths, labels = class_files(folder)
    if not paths:
        loose = " directly in it" if any(is_image(entry.name) for entry in os.scandir(folder)) else ""
        hint = "; for unlabeled images use data.name flat" if loose else ""
        expected = f"expected {folder}/CLASS/image.jpg, found {found_in(folder)}"
        raise UserError(f"no class folders with images in '{folder}': {expected}{loose}{hint}.")
    if classes is not None and found != classes:
        unknown = [name for name in found if name not in classes]
        if unknown:
            raise UserError(
                f"'{folder}' has {len(unknown)} classes that the train split lacks: {', '.join(unknown[:5])}."
            )
        place = torch.tensor([classes.index(name) for name in found])
        return FileSource(name, split, folder, paths, channels, classes, place[torch.tensor(labels)])
    return FileSource(name, split, folder, paths, channels, found, labels)


def open_folder(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`folder`: ROOT/{train,val,test}/CLASS/image, or ROOT/CLASS/image, which is one split, `all`, used for both
    ends."""
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
        classes = [name for name in subfolders(splits["train"]) if has_image(splits["train"] / name)]
    return class_folder_source(name, chosen, splits[chosen], cfg.channels, classes)


def open_flat(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`flat`: every image under ROOT, unlabeled; a folder named like the asked split is taken if there is one."""
    _need_folder(root, "flat", "any tree of image files")
    splits = split_folders(root)
    if splits and split is not None and ALIASES.get(split, split) in splits:
        root, chosen = splits[ALIASES.get(split, split)], split
    else:
        chosen = WHOLE if split in (None, "train") else choose_split(split, [*splits, WHOLE], f"'{root}'")
    paths = list(walk_images(root))
    if not paths:
        raise UserError(f"no images under '{root}': expected files such as .jpg or .png, found {found_in(root)}.")
    return FileSource(root.resolve().name, chosen, root, paths, cfg.channels)


def open_list(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """`list`: a text file of `path`, `path<TAB>label` or `path label`, or a folder with SPLIT.txt files of that
    kind."""
    file, chosen = root, WHOLE
    if root.is_dir():
        lists = {ALIASES.get(entry.stem.lower(), entry.stem.lower()): entry for entry in sorted(root.glob("*.txt"))}
        lists = {name: entry for name, entry in lists.items() if name in SPLITS}
        if not lists:
            raise UserError(
                f"data.root '{root}' is a folder without train.txt, val.txt or test.txt; found {found_in(root)}."
            )
        chosen = choose_split(split, lists, f"'{root}'")
        file = lists[chosen]
    elif split not in (None, "train", WHOLE):
        choose_split(split, [WHOLE], f"the list '{root}'")
    paths, words = _read_list(file)
    base = file.resolve().parent
    if not any((base / path).exists() for path in paths[:100]):
        tried = f"none of the first {min(100, len(paths))} paths in '{file}' exists"
        raise UserError(f"{tried}; relative ones are looked up in '{base}'. First: {paths[0]}")
    known = {word for word in words if word is not None}
    if not known:
        return FileSource(file.stem, chosen, base, paths, cfg.channels)
    if root.is_dir() and chosen != "train" and "train" in lists:
        trained = {word for word in _read_list(lists["train"])[1] if word is not None}
        if trained and known - trained:  # they would shift the numbers of the others
            raise UserError(
                f"'{file}' has {len(known - trained)} classes that train.txt lacks:"
                f" {', '.join(sorted(known - trained)[:5])}."
            )
        known |= trained
    classes = sorted(known, key=lambda word: (0, int(word), word) if re.fullmatch(r"\d+", word) else (1, 0, word))
    number = {word: i for i, word in enumerate(classes)}
    return FileSource(
        file.stem, chosen, base, paths, cfg.channels, classes, [-1 if word is None else number[word] for word in words]
    )


def _read_list(file: Path) -> tuple[list[str], list[str | None]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.root '{file}' is not a readable UTF-8 list of paths ({type(error).__name__}).") from None
    paths: list[str] = []
    words: list[str | None] = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if "\t" in line:
            path, word = line.rsplit("\t", 1)
        elif is_image(line) or not re.search(r"\s", line):  # ends like an image: a path, spaces and all
            path, word = line, None
        else:
            path, word = line.rsplit(None, 1)
        paths.append(path.strip())
        words.append(word)
    if not paths:
        raise UserError(f"the list '{file}' names no images: expected lines of `path` or `path<TAB>label`.")
    return paths, words


def open_tiny_imagenet(cfg: DataConfig, root: Path, split: str | None) -> FileSource:
    """Tiny-ImageNet as distributed: train/WNID/images with WNID_boxes.txt, val/images with val_annotations.txt,
    wnids.txt.

    ROOT is the set itself or a folder that holds one in `tiny-imagenet-*`. The test split has no public labels and is
    not
    offered: val is scored. Boxes in the files name the first and last pixel; here the last is exclusive. Class names
    come from
    words.txt.
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
    name = "Tiny-ImageNet" if len(wnids) == 200 else f"Tiny-ImageNet ({len(wnids)} classes)"
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
