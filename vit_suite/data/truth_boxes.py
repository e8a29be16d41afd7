"""Boxes of objects from the files that labeling tools write: VOC XML, COCO JSON, lines of text.

A box is [x0, y0, x1, y1] in pixels, x1 and y1 exclusive. One bad entry (a box without numbers, an XML file that does
not parse) is listed and left out; the rest is read.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vit_suite.data.decode import DecodeError, is_image
from vit_suite.data.listing import found_in
from vit_suite.errors import UserError, short

Box = list[float]


@dataclass
class ImageBoxes:
    """What a file says about one image."""

    boxes: list[Box] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """(H, W) of the image, where the file tells it."""
    name: str | None = None
    """File name of the image, where a VOC file tells it."""


@dataclass
class BoxFile:
    """All that a truth holds."""

    what: str
    """`VOC XML`, `COCO`, `text`."""
    images: dict[str, ImageBoxes] = field(default_factory=dict)
    """Name as the file has it (VOC: of the XML without extension) -> boxes."""
    failures: list[DecodeError] = field(default_factory=list)
    zeros: int = 0
    """VOC boxes that begin at 0, which VOC itself never writes."""


def find_xml(folder: Path) -> list[Path]:
    """XML files below a folder, any case; hidden ones, such as macOS's `._` files, left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() == ".xml" and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def read_boxes(truth: Path, origin: int = 1) -> BoxFile:
    """Boxes of a COCO JSON, a text file, or a folder of VOC XML or of `*boxes.txt`; UserError for anything else.

    origin: the number that VOC XML gives the first pixel, 1 in VOC itself.
    """
    if truth.is_file() and (truth.suffix.lower() == ".json" or _is_json(truth)):
        return _coco(truth)
    if truth.is_file() and truth.suffix.lower() == ".txt":
        return _text([truth])
    if truth.is_dir():
        if files := find_xml(truth):
            return _voc(truth, files, origin)
        for pattern in ("*boxes.txt", "*annotations.txt"):
            if lists := sorted(path for path in truth.rglob(pattern) if path.is_file()):
                return _text(lists)
    if truth.is_file() and is_image(truth.name):
        raise UserError(f"truth '{truth}' is one image; expected the folder of masks.")
    raise UserError(
        f"truth '{truth}' holds {found_in(truth)}; expected a folder of masks or VOC XML, a COCO .json, or a .txt of"
        " boxes."
    )


def _is_json(file: Path) -> bool:
    """Whether a text file holds a JSON object, whatever its ending is."""
    with open(file, "rb") as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _voc(folder: Path, files: list[Path], origin: int) -> BoxFile:
    """All objects, difficult ones too, as LOST's evaluation takes them. The last pixel is named, so x1 is one more."""
    found = BoxFile("VOC XML")
    expected = "expected object/bndbox with xmin, ymin, xmax, ymax"
    for file in files:
        try:
            root = ElementTree.parse(file).getroot()
            width, height = (int(float(root.findtext(f"size/{name}") or 0)) for name in ("width", "height"))
        except (ElementTree.ParseError, OSError, ValueError, OverflowError) as error:
            found.failures.append(DecodeError(str(file), f"is no VOC annotation ({error}): {expected}"))
            continue
        size = (height, width) if width and height else None
        entry = ImageBoxes(size=size, name=root.findtext("filename") or None)
        for box in root.iterfind("object/bndbox"):
            words = [box.findtext(name) for name in ("xmin", "ymin", "xmax", "ymax")]
            try:
                x0, y0, x1, y1 = (float(word or "nothing") for word in words)
            except ValueError:
                found.failures.append(DecodeError(str(file), f"a box of {words}: {expected}"))
                continue
            found.zeros += min(x0, y0) == 0
            entry.boxes.append([x0 - origin, y0 - origin, x1 - origin + 1, y1 - origin + 1])
        found.images[str(file.relative_to(folder).with_suffix(""))] = entry
    return found


def _coco(file: Path) -> BoxFile:
    """Boxes of single objects: crowds are left out, as LOST's evaluation does. Entries of one file name are joined."""
    found = BoxFile("COCO")
    expected = "expected images and annotations with image_id and bbox"
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        named = {image["id"]: str(image["file_name"]) for image in content["images"]}
        notes = list(content["annotations"])
        for image in content["images"]:
            entry = found.images.setdefault(str(image["file_name"]), ImageBoxes())
            if image.get("height") and image.get("width"):
                entry.size = int(float(image["height"])), int(float(image["width"]))
    except (KeyError, TypeError, ValueError, RecursionError, OSError, AttributeError, OverflowError) as error:
        what = short(f"{type(error).__name__}: {error}")
        raise UserError(f"'{file}' is no COCO annotation ({what}): {expected}.") from error
    for number, note in enumerate(notes):
        try:
            if note.get("iscrowd"):
                continue
            entry = found.images[named[note["image_id"]]]
            x, y, width, height = map(float, note["bbox"])
            entry.boxes.append([x, y, x + width, y + height])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"annotation {number} ({type(error).__name__}: {error}): {expected}"
            found.failures.append(DecodeError(f"{file}#{number}", what))
    return found


def _text(files: list[Path]) -> BoxFile:
    """Lines `name x0 y0 x1 y1` or `name WNID x0 y0 x1 y1` with the first and last pixel; several lines of one name are
    several boxes. UserError for a file whose numbers are shares of the image."""
    found = BoxFile("text")
    for file in files:
        numbers: list[float] = []
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{file}' is no UTF-8 text of boxes ({type(error).__name__}).") from None
        for number, line in enumerate(lines, 1):
            words: list[Any] = line.split()
            if not words:
                continue
            try:
                x0, y0, x1, y1 = map(float, words[-4:])
                if len(words) not in (5, 6):
                    raise ValueError
            except ValueError:
                reason = f"expected `name [WNID] x0 y0 x1 y1`, found '{line[:80].strip()}'"
                found.failures.append(DecodeError(f"{file}:{number}", reason))
                continue
            numbers += (x0, y0, x1, y1)
            found.images.setdefault(words[0], ImageBoxes()).boxes.append([x0, y0, x1 + 1, y1 + 1])
        if all(0 <= number <= 1 for number in numbers) and not all(number in (0, 1) for number in numbers):
            raise UserError(
                f"'{file}' has shares of the image, as YOLO writes them; expected pixels: `name [WNID] x0 y0 x1 y1`."
            )
    return found
