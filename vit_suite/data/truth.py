"""Where the objects of images are, from files that others made: folders of masks, VOC XML, COCO JSON, Tiny-ImageNet's
text.

Truth of an image is a mask, int8 (H, W) of 1 object, 0 ground, -1 left out, or boxes, float32 (K, 4) of x0, y0, x1, y1
in pixels, x1 and y1 exclusive. A truth and an image belong together if they have the same path below their folders, or
the same name, each with or without its extension; the rule that matches the most images is taken. What was taken, and
how many matched, is logged.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vit_suite.data.decode import DecodeError, image_size
from vit_suite.data.listing import Listing, found_in
from vit_suite.data.source import FileSource, ImageSource
from vit_suite.data.truth_boxes import BoxFile, ImageBoxes, find_xml, read_boxes
from vit_suite.data.truth_masks import MaskValues, read_mask
from vit_suite.errors import UserError, short
from vit_suite.files import printable

__all__ = ["MaskValues", "Truths", "open_truths", "read_mask", "source_truths"]

log = logging.getLogger("vit_suite")

SHOWN = 5
"""Names in a message."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Truths:
    """Truth of the images of a source, by index."""

    kind: Literal["masks", "boxes"]
    title: str
    """What it is and where it is from, for a protocol."""
    load: Callable[[int], Tensor]
    """index -> mask or boxes as in the docstring above; no 1, or no box, where the image shows no object. DecodeError
    for a mask that cannot be used."""


def source_truths(source: ImageSource) -> Truths | None:
    """Masks or boxes that a data set brings itself; None when it has neither."""
    if source.has_masks:
        return Truths("masks", f"masks of {source.title}", lambda index: source.mask(index).to(torch.int8))
    boxes = source.boxes
    if boxes is None:
        return None

    def load(index: int) -> Tensor:
        box = boxes[index : index + 1]
        return box[~box.isnan().any(1)]

    return Truths("boxes", f"boxes of {source.title}", load)


def open_truths(
    images: str | Path, truth: str | Path, values: MaskValues = "auto", channels: int = 3, origin: int = 1
) -> tuple[FileSource, Truths]:
    """The images under a folder that have a truth, and their truths: a folder of masks or of VOC XML, a COCO JSON, or
    text lines `name [WNID] x0 y0 x1 y1` (a file, or all `*boxes.txt` under a folder).

    values: what masks hold (`read_mask`). origin: see `read_boxes`. Boxes go before masks where a folder holds both.
    Images and truths without a partner are left out and logged by name. A truth that cannot be used is listed in the
    `failures` of the source.
    UserError when nothing matches, or when the masks are the photographs themselves.
    """
    images, truth = Path(images), Path(truth)
    if not images.is_dir():
        raise UserError(
            f"images '{images}' {'is no folder' if images.exists() else 'does not exist'}; expected a folder of images."
        )
    listing = Listing(images)
    paths = list(listing.walk())
    if not paths:
        raise UserError(f"no images under '{images}': it holds {found_in(images)}.")
    if not truth.exists():
        raise UserError(
            f"truth '{truth}' does not exist; expected a folder of masks or VOC XML, a COCO JSON, or a text file of"
            " boxes."
        )
    masks = _masks(images, truth) if truth.is_dir() and not find_xml(truth) else []
    if masks:
        source, truths = _with_masks(images, paths, truth, masks, values, channels)
    else:
        if truth.is_dir() and images.resolve() == truth.resolve() and not find_xml(truth):
            raise UserError(f"truth '{truth}' is the images folder itself; expected a folder of masks or boxes.")
        source, truths = _with_boxes(images, paths, truth, read_boxes(truth, origin), channels)
    source.failures = [*listing.failures, *source.failures]
    return source, truths


def _masks(images: Path, truth: Path) -> list[str]:
    """Image files below `truth` that are none of the photographs: those lie below `images`."""
    inside = os.path.realpath(images) + os.sep
    return [name for name in Listing(truth).walk() if not os.path.realpath(truth / name).startswith(inside)]


def _with_masks(
    images: Path, paths: list[str], truth: Path, masks: list[str], values: MaskValues, channels: int
) -> tuple[FileSource, Truths]:
    partners = _match(paths, {name: truth / name for name in masks}, images, truth, "masks")
    _refuse_copies([(images / paths[i], file) for i, file in partners.items()], truth)
    good, failures = [], []
    for i, file in partners.items():
        if wrong := _wrong_size(images / paths[i], image_size(file), file):
            failures.append(DecodeError(str(file), wrong))
        else:
            good.append(i)
    files = [partners[i] for i in good]

    def load(index: int) -> Tensor:
        try:
            return read_mask(files[index], values)
        except UserError as error:
            raise DecodeError(str(files[index]), str(error)) from None

    return _source(images, paths, good, failures, channels), Truths("masks", f"masks in {truth}", load)


def _with_boxes(
    images: Path, paths: list[str], truth: Path, found: BoxFile, channels: int
) -> tuple[FileSource, Truths]:
    _by_filename(found, paths)
    partners = _match(paths, found.images, images, truth, f"boxes ({found.what})")
    failures, good, tensors = list(found.failures), [], []
    for i, entry in partners.items():
        image = images / paths[i]
        if wrong := _wrong_size(image, entry.size, truth):
            failures.append(DecodeError(f"{truth}: {paths[i]}", wrong))
            continue
        fitting, wrong_boxes = _fitting(entry, image_size(image))
        if wrong_boxes:
            reason = f"boxes that are empty or lie outside of the image are left out: {wrong_boxes[:SHOWN]}"
            failures.append(DecodeError(f"{truth}: {paths[i]}", reason))
        good.append(i)
        tensors.append(torch.tensor(fitting, dtype=torch.float32).view(-1, 4))
    if found.zeros:
        log.warning(
            "%d boxes in '%s' begin at 0: files that count pixels from 0 need --box_origin 0", found.zeros, truth
        )
    return _source(images, paths, good, failures, channels), Truths("boxes", f"boxes in {truth}", tensors.__getitem__)


def _by_filename(found: BoxFile, paths: list[str]) -> None:
    """Where no VOC file is called as an image is, take the names that stand in them (`<filename>`)."""
    stems = {Path(path).stem for path in paths}
    inside = {Path(entry.name).stem: entry for entry in found.images.values() if entry.name}
    if stems.isdisjoint(Path(name).name for name in found.images) and not stems.isdisjoint(inside):
        log.warning("no VOC file has the name of an image: the <filename> in each says which one it is about")
        found.images = inside


def _source(images: Path, paths: list[str], good: list[int], failures: list[DecodeError], channels: int) -> FileSource:
    if not good:
        raise UserError(f"no truth fits its image; the first: {failures[0]}.")
    source = FileSource(images.resolve().name, "images", images, [paths[i] for i in good], channels)
    source.failures = failures
    return source


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


WAYS: tuple[Callable[[str], str], ...] = (
    lambda name: os.path.normpath(name),
    lambda name: _stem(os.path.normpath(name)),
    lambda name: Path(name).name,
    lambda name: Path(name).stem,
)
"""What an image and its truth have in common, by each rule: path, path without extension, name, name without
extension."""


def _match(paths: Sequence[str], truths: dict[str, Value], images: Path, truth: Path, what: str) -> dict[int, Value]:
    """{index of the image: its truth}, in the order of the images, by the rule of `WAYS` that matches the most. A key
    that two images or two truths have matches nothing."""
    best: dict[int, str] = {}
    for way in WAYS:
        keys = [way(path) for path in paths]
        by_key: dict[str, str] = {}
        counts = Counter(way(name) if what != "boxes (VOC XML)" else _voc_key(way, name) for name in truths)
        for name in truths:
            key = way(name) if what != "boxes (VOC XML)" else _voc_key(way, name)
            if counts[key] == 1:
                by_key[key] = name
        own = Counter(keys)
        found = {i: by_key[key] for i, key in enumerate(keys) if key in by_key and own[key] == 1}
        if len(found) > len(best):
            best = found
    alone = [path for i, path in enumerate(paths) if i not in best]
    spare = sorted(truths.keys() - set(best.values()))
    if not best:
        called = [_stem(name) if "masks" in what else name for name in spare]
        raise UserError(
            f"no truth in '{truth}' has the name of an image in '{images}': truths are called {_listed(called)}, images"
            f" {_listed(alone)}."
        )
    log.info(
        "truth: %s in '%s'; %d of %d images have one, %d truths belong to no image",
        what,
        truth,
        len(best),
        len(paths),
        len(spare),
    )
    if alone:
        log.warning(
            "%d of %d images in '%s' have no truth and are left out: %s", len(alone), len(paths), images, _listed(alone)
        )
    if spare:
        log.warning("%d truths in '%s' belong to no image: %s", len(spare), truth, _listed(spare))
    return {i: truths[name] for i, name in best.items()}


def _voc_key(way: Callable[[str], str], name: str) -> str:
    """`way(name)` for the name of a VOC file, which has no extension any more: `IMG.2020` must not lose its second
    part."""
    return os.path.normpath(name) if way in WAYS[:2] else Path(name).name


def _listed(names: Sequence[object]) -> str:
    shown = ", ".join(short(printable(str(name))) for name in names[:SHOWN])
    return shown + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _refuse_copies(pairs: list[tuple[Path, Path]], truth: Path) -> None:
    """UserError if masks are copies of the photographs: the score would then be against the photographs' own colors."""
    copies = [mask for image, mask in pairs if _same_file(image, mask)]
    if copies:
        raise UserError(
            f"truth '{truth}': {len(copies)} of {len(pairs)} masks are the photographs themselves ({copies[0].name},"
            " ...); expected masks of objects."
        )


def _same_file(one: Path, other: Path) -> bool:
    try:
        same_size = one.is_file() and other.is_file() and one.stat().st_size == other.stat().st_size
        return same_size and one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _wrong_size(image: Path, size: tuple[int, int] | None, truth: Path) -> str | None:
    own = image_size(image)
    if own and size and own != size:
        return f"{image.name} is {own[1]}x{own[0]}, its truth in {truth.name} {size[1]}x{size[0]}"
    return None


def _fitting(entry: ImageBoxes, size: tuple[int, int] | None) -> tuple[list[list[float]], list[list[float]]]:
    """(boxes that fit, boxes that are empty or reach more than a pixel beyond the image)."""
    height, width = size or (float("inf"), float("inf"))
    good: list[list[float]] = []
    bad: list[list[float]] = []
    for box in entry.boxes:
        x0, y0, x1, y1 = box
        fits = x1 > x0 and y1 > y0 and min(x0, y0) >= -1 and x1 <= width + 1 and y1 <= height + 1
        (good if fits else bad).append(box)
    return good, bad
