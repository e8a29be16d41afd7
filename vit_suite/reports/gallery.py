"""index.html of an attention export: every image with its maps, in one file that works from disk.

A page that is opened from disk may read no other file. So the page (gallery.html beside this file) holds everything
that it shows: pictures as small JPEGs, and maps with 16 bits a patch, from which the browser draws the mask of any
threshold. Links to the exported files are relative. An image takes about 15 KB, and 2.7 bytes for each map and patch.

Axes: n maps, h heads, gh x gw patches.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from vit_suite.attention.manifest import NAME, OK, read_manifest
from vit_suite.attention.palette import INFERNO
from vit_suite.attention.render import as_picture
from vit_suite.data.decode import DecodeError, decode
from vit_suite.data.pixels import READING, Reading
from vit_suite.data.reading import prefetch
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.files import write_atomically

SIDE = 320
"""Longest side in pixels of a picture in the page."""
LOSSLESS = 96
"""Pictures up to this side are PNG, drawn pixel by pixel."""
MOST = 400 * 2**20
"""Bytes of a page; Chromium's longest string is 512 MiB."""
SUMMARIES = ("mean", "max", "rollout")


def write_gallery(folder: str | Path, source: ImageSource | None = None, reading: Reading = READING) -> Path:
    """Write FOLDER/index.html from manifest.csv and the npz files that an export left in FOLDER; returns its path.

    Pictures come from the files that the manifest names; for a data set without files from `source`; else from the
    first overlay. `reading` is how the export read the files. UserError when there is no manifest, an image has no npz,
    images do not have the same maps, or the page would be too large.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        raise UserError(f"'{folder}' holds no {NAME}: a gallery is made of what `vit-suite attention` wrote.")
    images: dict[str, list[dict[str, str]]] = {}
    for row in read_manifest(folder):
        if row["status"] == OK and row["image"]:
            images.setdefault(row["image"], []).append(row)
    without = [image for image, rows in images.items() if not any(row["kind"] == "npz" for row in rows)]
    if without or not images:
        what = (
            f"{len(without)} of {len(images)} images have none, first '{without[0]}'"
            if without
            else "it names no image"
        )
        raise UserError(f"a gallery needs the numbers of every image (--formats npz ...): in '{folder / NAME}' {what}.")
    places = {} if source is None else {source.path(index): index for index in range(len(source))}

    def item(entry: tuple[str, list[dict[str, str]]]) -> tuple[list[str], float, dict[str, Any]]:
        if source is None or entry[0] not in places:
            return _item(folder, *entry, _read(*entry, folder, reading))
        return _item(folder, *entry, source.load(places[entry[0]]).numpy())

    path = folder / "index.html"
    write_atomically(path, lambda temporary: _write(temporary, folder, prefetch(item, images.items(), ahead=32)))
    return path


def _write(path: Path, folder: Path, items: Iterable[tuple[list[str], float, dict[str, Any]]]) -> None:
    """The page, an image at a time."""
    title = html.escape(f"Attention: {_shown(folder.resolve().name)}")
    page = files("vit_suite.reports").joinpath("gallery.html").read_text(encoding="utf-8")
    head, tail = page.split("@DATA@")  # before the title goes in: a folder may be called like a placeholder
    head = head.replace("@TITLE@", title)
    first: list[str] | None = None
    written = 0
    with path.open("w", encoding="utf-8") as file:
        file.write(head)
        for labels, threshold, item in items:
            if first is None:
                first = labels
                inferno = base64.b64encode(INFERNO.tobytes()).decode()
                start = json.dumps({"labels": labels, "threshold": threshold, "inferno": inferno})
                written += file.write(start[:-1] + ', "items": [\n')
            elif labels != first:
                raise UserError(
                    f"a gallery shows the same maps of every image; '{item['name']}' has {labels}, others {first}."
                )
            else:
                written += file.write(",\n")
            written += file.write(json.dumps(item).replace("<", "\\u003c"))  # no name can end the script
            if written > MOST:
                raise UserError(
                    f"the gallery of '{folder}' would take over {MOST >> 20} MiB; export fewer images or a smaller"
                    " image_size."
                )
        file.write("\n]}")
        file.write(tail)


def _item(
    folder: Path, image: str, rows: list[dict[str, str]], picture: np.ndarray | None
) -> tuple[list[str], float, dict[str, Any]]:
    """(names of the maps, threshold of the export, what the page holds of the image)."""
    name = next(row["file"] for row in rows if row["kind"] == "npz")
    with np.load(folder / name) as stored:
        arrays = {key: stored[key] for key in stored.files}
    heads = arrays["attention"]  # (h, gh, gw)
    maps = {f"head{i}": head for i, head in enumerate(heads)} | {"mean": heads.mean(0)}
    maps |= {label: arrays[label] for label in SUMMARIES if label in arrays}
    links = [(_title(row), quote(os.fsencode(row["file"]))) for row in rows]
    components = [decode(folder / row["file"]) for row in rows if row["kind"] == "pca"]
    return (
        list(maps),
        float(arrays["threshold"]),
        ({"pca": data_uri(components[0])} if components else {})
        | {
            "name": _shown(name.removesuffix("_attention.npz")),
            "size": [int(side) for side in arrays["image_size"]],
            "grid": list(heads.shape[1:]),
            "picture": data_uri(picture),
            "maps": base64.b64encode(quantized(np.stack(list(maps.values()))).tobytes()).decode(),
            "files": links,
        },
    )


def _read(image: str, rows: list[dict[str, str]], folder: Path, reading: Reading) -> np.ndarray | None:
    """uint8 (C, H, W) of the image; where it cannot be read, of its first overlay; else None."""
    overlays = [folder / row["file"] for row in rows if row["kind"] == "overlay"]
    for path, how in [(Path(image), reading), *((path, READING) for path in overlays[:1])]:
        try:
            return decode(path, reading=how)
        except (DecodeError, UserError):  # moved away since, or of more channels than a picture has
            continue
    return None


def quantized(maps: np.ndarray) -> np.ndarray:
    """Maps (n, gh, gw), 0 or more -> little-endian uint16 of the same shape. The largest value of each map becomes
    65535."""
    most = maps.max((1, 2), keepdims=True)
    return np.rint(maps * np.divide(65535, most, out=np.zeros_like(most), where=most > 0)).astype("<u2")


def data_uri(picture: np.ndarray | None) -> str:
    """A picture uint8 (C, H, W) as a data URI of at most `SIDE` pixels a side; None gives a gray pixel."""
    pixels = np.full((1, 1, 3), 64, np.uint8) if picture is None else np.ascontiguousarray(as_picture(picture))
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    kind, options = ("PNG", {}) if max(image.size) <= LOSSLESS else ("JPEG", {"quality": 82})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _title(row: dict[str, str]) -> str:
    head = f"head {row['head']}" if row["head"].isdigit() else row["head"]
    return f"{head} {row['kind']}".strip()


def _shown(name: str) -> str:
    """The name; bytes that are no UTF-8 become a mark."""
    return os.fsencode(name).decode("utf-8", "replace")
