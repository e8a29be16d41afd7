"""Where the objects of images are, from files that others made: folders of masks, VOC XML, COCO JSON, Tiny-ImageNet's
text.

Truth of an image is a mask, int8 (H, W) of 1 object, 0 ground, -1 left out, or boxes, float32 (K, 4) of x0, y0, x1, y1
in pixels, x1 and y1 exclusive (VOC and Tiny-ImageNet name the last pixel; VOC counts from 1). Files are matched with
images by their path without extension, relative to the folder given, or where no path fits by their name alone.
"""

from __future__ import annotations

import json
import logging
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_suite.data.decode import image_size, is_image
from vit_suite.data.listing import found_in, walk_images
from vit_suite.data.source import FileSource, ImageSource
from vit_suite.errors import UserError, short

log = logging.getLogger("vit_suite")

VOID = (224, 224, 192)
"""Color of index 255 in VOC's palette."""
SHOWN = 5
"""Names in a message."""
MaskValues = Literal["auto", "index", "gray"]
Boxes = dict[str, tuple[list[list[float]], tuple[int, int] | None]]
"""Path without extension -> (boxes, size (H, W) of the image where the file tells it)."""


@dataclass(frozen=True)
class Truths:
    """Truth of the images of a source, by index."""

    kind: Literal["masks", "boxes"]
    title: str
    """What it is and where it is from, for a protocol."""
    load: Callable[[int], Tensor]
    """index -> mask or boxes as in the docstring above; no 1, or no box, where the image shows no object."""


def source_truths(source: ImageSource) -> Truths | None:
    """Masks or boxes that a data set brings itself; None when it has neither."""
    if source.has_masks:
        return Truths("masks", f"masks of {source.title}", lambda index: source.mask(index).to(torch.int8))
    if source.boxes is None:
        return None

    def load(index: int) -> Tensor:
        box = source.boxes[index : index + 1]
        return box[~box.isnan().any(1)]

    return Truths("boxes", f"boxes of {source.title}", load)


def open_truths(
    images: str | Path, truth: str | Path, values: MaskValues = "auto", channels: int = 3
) -> tuple[FileSource, Truths]:
    """The images under a folder that have a truth, and their truths: a folder of masks or of VOC XML, a COCO JSON, or
    text lines `name [WNID] x0 y0 x1 y1` (a file, or all `*boxes.txt` under a folder).

    values: what masks hold (`read_mask`). What finds no partner is left out and logged by name. UserError when nothing
    matches, or when
    sizes do not fit, with the names.
    """
    images, truth = Path(images), Path(truth)
    if not images.is_dir():
        raise UserError(
            f"images '{images}' {'is no folder' if images.exists() else 'does not exist'}; expected a folder of images."
        )
    paths = list(walk_images(images))
    if not paths:
        raise UserError(f"no images under '{images}': it holds {found_in(images)}.")
    if not truth.exists():
        raise UserError(
            f"truth '{truth}' does not exist; expected a folder of masks or VOC XML, a COCO JSON, or a text file of"
            " boxes."
        )
    masks = [name for name in walk_images(truth)] if truth.is_dir() else []
    if masks and images.resolve() == truth.resolve():
        raise UserError(f"truth '{truth}' is the images folder itself; expected a folder of masks.")
    if masks:
        partners = _match(paths, {_stem(name): truth / name for name in masks}, images, truth)
        _check_sizes([(images / paths[i], image_size(file), file) for i, file in partners.items()])
        load = [partners[i] for i in partners]
        truths = Truths("masks", f"masks in {truth}", lambda index: read_mask(load[index], values))
    else:
        partners = _match(paths, read_boxes(truth), images, truth)
        _check_sizes([(images / paths[i], size, truth) for i, (_, size) in partners.items() if size])
        tensors = [torch.tensor(boxes, dtype=torch.float32).view(-1, 4) for boxes, _ in partners.values()]
        _check_boxes(tensors, [images / paths[i] for i in partners])
        truths = Truths("boxes", f"boxes in {truth}", tensors.__getitem__)
    source = FileSource(images.resolve().name, "images", images, [paths[i] for i in partners], channels)
    return source, truths


def _stem(name: str) -> str:
    return str(Path(name).with_suffix(""))


def _match(paths: Sequence[str], truths: dict[str, object], images: Path, truth: Path) -> dict[int, object]:
    """{index of the image: its truth}, in the order of the images."""
    keys = [_stem(path) for path in paths]
    if not truths.keys() & set(keys):  # the trees differ: names alone
        by_name = {Path(key).name: value for key, value in truths.items()}
        names = [Path(key).name for key in keys]
        if len(by_name) == len(truths) and max(Counter(names).values()) == 1:
            keys, truths = names, by_name
    partners = {i: truths[key] for i, key in enumerate(keys) if key in truths}
    alone = [path for i, path in enumerate(paths) if i not in partners]
    spare = sorted(truths.keys() - set(keys))
    if not partners:
        raise UserError(
            f"no truth in '{truth}' has the name of an image in '{images}': truths are called {_listed(spare)}, images"
            f" {_listed(alone)}."
        )
    if alone:
        log.warning(
            "%d of %d images in '%s' have no truth and are left out: %s", len(alone), len(paths), images, _listed(alone)
        )
    if spare:
        log.warning("%d truths in '%s' belong to no image: %s", len(spare), truth, _listed(spare))
    return partners


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _check_sizes(found: list[tuple[Path, tuple[int, int] | None, Path]]) -> None:
    """(image, size that the truth has, truth): UserError naming those whose sizes differ."""
    wrong = []
    for image, size, truth in found:
        own = image_size(image)
        if own and size and own != size:
            wrong.append(f"{image.name} is {own[1]}x{own[0]}, its truth in {truth.name} {size[1]}x{size[0]}")
    if wrong:
        raise UserError(f"{len(wrong)} truths are not of the size of their image: {'; '.join(wrong[:SHOWN])}.")


def _check_boxes(boxes: list[Tensor], images: list[Path]) -> None:
    """UserError naming images with boxes that are empty or reach more than a pixel beyond the image."""
    wrong = []
    for one, image in zip(boxes, images, strict=True):
        size = image_size(image)
        limits = torch.tensor([size[1], size[0]]) + 1 if size else torch.tensor([torch.inf, torch.inf])
        if not ((one[:, 2:] > one[:, :2]).all() and (one[:, :2] >= -1).all() and (one[:, 2:] <= limits).all()):
            wrong.append(
                f"{image.name} ({'x'.join(map(str, reversed(size))) if size else 'unknown size'}): {one.tolist()}"
            )
    if wrong:
        raise UserError(
            f"the boxes of {len(wrong)} images are empty or lie outside of them: {'; '.join(wrong[:SHOWN])}."
        )


# Masks
# ----------------------------------------------------------------------------------------------------------------------


def read_mask(path: str | Path, values: MaskValues = "auto") -> Tensor:
    """A mask file as int8 (H, W) of 1 object, 0 ground, -1 left out.

    values: index = 0 is ground, 255 is left out (VOC's borders), others are objects; gray = above 127 is object; auto =
    files with one
    value besides 0 are masks of that value, palette files are indices, colors are objects except black (ground) and
    VOC's color of 255 (left out), and gray files of more values are refused, since they could be either.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            pixels, palette = np.load(path, allow_pickle=False), False
        else:
            with Image.open(path) as image:
                palette = image.mode == "P"
                plain = palette or image.mode in ("1", "L") or image.mode.startswith("I")
                pixels = np.asarray(image if plain else image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise almost anything on damaged input
        raise UserError(f"mask '{path}' cannot be read ({type(error).__name__}: {error}).") from error
    if pixels.ndim == 3 and pixels.shape[2] == 3 and bool((pixels == pixels[..., :1]).all()):
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] == 3 and values == "auto":
        left_out = (pixels == VOID).all(-1)
        return _trinary(pixels.any(-1) & ~left_out, left_out)
    if pixels.ndim != 2:
        raise UserError(
            f"mask '{path}' has shape {pixels.shape}; expected one value a pixel, or colors with mask_values auto."
        )
    if values == "gray":
        return _trinary(pixels > (127 if pixels.dtype == np.uint8 else 0))
    kinds = np.unique(pixels)
    if values == "auto" and len(kinds[kinds != 0]) <= 1:
        return _trinary(pixels != 0)
    if values == "auto" and not palette:
        raise UserError(
            f"gray mask '{path}' holds {len(kinds)} values ({_listed(kinds.tolist())}): say with mask_values whether"
            " they are class numbers (index) or shades (gray)."
        )
    return _trinary((pixels != 0) & (pixels != 255), pixels == 255)


def _trinary(objects: np.ndarray, left_out: np.ndarray | None = None) -> Tensor:
    mask = torch.from_numpy(objects.astype(np.int8))
    return mask if left_out is None else mask - torch.from_numpy(left_out.astype(np.int8))


# Boxes
# ----------------------------------------------------------------------------------------------------------------------


def read_boxes(truth: Path) -> Boxes:
    """Boxes of a COCO JSON, a text file, or a folder of VOC XML or of `*boxes.txt`; UserError for anything else."""
    if truth.is_file() and truth.suffix.lower() == ".json":
        return _coco(truth)
    if truth.is_file() and truth.suffix.lower() == ".txt":
        return _text(truth)
    if truth.is_dir():
        files = sorted(truth.rglob("*.xml"))
        if files:
            return {_stem(str(file.relative_to(truth))): _voc(file) for file in files}
        lists = sorted(truth.rglob("*boxes.txt")) or sorted(truth.rglob("*annotations.txt"))
        if lists:
            return {name: found for file in lists for name, found in _text(file).items()}
    if truth.is_file() and is_image(truth.name):
        raise UserError(f"truth '{truth}' is one image; expected the folder of masks.")
    raise UserError(
        f"truth '{truth}' holds {found_in(truth)}; expected a folder of masks or VOC XML, a COCO .json, or a .txt of"
        " boxes."
    )


def _voc(file: Path) -> tuple[list[list[float]], tuple[int, int] | None]:
    """All objects, difficult ones too, as LOST's evaluation takes them."""
    try:
        root = ElementTree.parse(file).getroot()
        boxes = []
        for box in root.iterfind("object/bndbox"):
            x0, y0, x1, y1 = (float(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append([x0 - 1, y0 - 1, x1, y1])
        width, height = (int(root.findtext(f"size/{name}") or 0) for name in ("width", "height"))
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise UserError(
            f"'{file}' is no VOC annotation ({error}): expected object/bndbox with xmin, ymin, xmax, ymax."
        ) from error
    return boxes, (height, width) if width and height else None


def _coco(file: Path) -> Boxes:
    """Boxes of single objects: crowds are left out, as LOST's evaluation does."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
        for note in content["annotations"]:
            if not note.get("iscrowd"):
                x, y, width, height = note["bbox"]
                found[note["image_id"]].append([x, y, x + width, y + height])
        sizes = {
            i["id"]: (i["height"], i["width"]) if "height" in i and "width" in i else None for i in content["images"]
        }
        return {_stem(image["file_name"]): (found[image["id"]], sizes[image["id"]]) for image in content["images"]}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = short(f"{type(error).__name__}: {error}")
        raise UserError(
            f"'{file}' is no COCO annotation ({what}): expected images and annotations with image_id and bbox."
        ) from error


def _text(file: Path) -> Boxes:
    """Lines `name x0 y0 x1 y1` or `name WNID x0 y0 x1 y1` with the first and last pixel; several lines of one name are
    several boxes."""
    found: Boxes = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is no text of boxes ({error}); expected `name [WNID] x0 y0 x1 y1` lines.") from None
    for line in lines:
        words = line.split()
        if not words:
            continue
        try:
            x0, y0, x1, y1 = map(float, words[-4:])
            if len(words) not in (5, 6):
                raise ValueError
        except ValueError:
            raise UserError(f"'{file}': expected `name [WNID] x0 y0 x1 y1`, found '{line[:80]}'.") from None
        found.setdefault(_stem(words[0]), ([], None))[0].append([x0, y0, x1 + 1, y1 + 1])
    return found
