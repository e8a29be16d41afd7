"""The formats of an attention export: one row each in `FORMATS`, and how the files of one picture are written.

A new format is a writer and a row, and its word in `AttentionConfig`. There are three kinds:

- a picture of each map (`paint`): cat_head0_overlay.png
- one file for each picture (`write`): cat_attention.npz
- files about all pictures (`gather`): coco.json. What they need of each picture is kept in its record (`keep` once a
  picture, `note` for each map).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_suite.attention import render
from vit_suite.attention.animate import gather_animations, keep_maps
from vit_suite.attention.coco import annotation, gather_coco
from vit_suite.attention.drawing import Drawing, Export, Seen
from vit_suite.attention.labels import write_labels
from vit_suite.attention.manifest import Records, column
from vit_suite.attention.numbers import write_numbers
from vit_suite.attention.pca import write_components
from vit_suite.attention.png import write_jpeg, write_png
from vit_suite.attention.video import need_av

Painter = Callable[[np.ndarray, np.ndarray, np.ndarray], Iterable[np.ndarray]]
"""(picture uint8 (H, W, 3), levels of color uint8 (n, H, W), masks of the top mass bool (n, H, W)) -> n pictures."""
STRIP = 2**21
"""Pixels of maps that are drawn together. At 12 megapixels two maps would already fill half a GiB of floats."""


class Format(NamedTuple):
    """A row of `FORMATS`."""

    suffix: str = ""
    """Last part of a file's name; empty where one file holds all pictures. An overlay gets its ending by size."""
    paint: Painter | None = None
    """Draws a picture of each map."""
    write: Callable[[Path, Seen], None] | None = None
    """Writes one file of a picture."""
    keep: Callable[[Seen], dict[str, Any]] | None = None
    """What the record of a picture keeps for `gather`; must be JSON."""
    note: Callable[[np.ndarray], dict[str, Any]] | None = None
    """The same of each map, from its mask (H, W): a list under the format's name, with the map's name as `head`."""
    gather: Callable[[Export, Records, str], list[dict[str, Any]]] | None = None
    """Writes the files about all pictures, given the format's name; returns their lines of the manifest."""
    source: Literal["attention", "features"] = "attention"
    """What it shows. Features need no CLS token."""
    own_size: bool = False
    """Whether the file has the size of the image, however large; else the size that pictures are drawn at."""
    thresholded: bool = False
    """Whether a file depends on the threshold, which its line of the manifest then shows."""
    require: Callable[[str], object] | None = None
    """Called with `format NAME` before anything is written; UserError when a library is missing."""
    bytes_a_pixel: float = 0.0
    """Size of a file on photographs of 12 megapixels with patches of 16 pixels, for the estimate (`estimate.py`)."""


FORMATS: dict[str, Format] = {
    "png": Format("heat.png", paint=lambda shown, level, masks: render.heat_map(level), bytes_a_pixel=0.02),
    "overlay": Format("overlay", paint=render.overlay, thresholded=True, bytes_a_pixel=1.1),
    "mask": Format(
        "mask.png", paint=lambda shown, level, masks: masks, own_size=True, thresholded=True, bytes_a_pixel=0.006
    ),
    "labels": Format("labels.png", write=write_labels, own_size=True, bytes_a_pixel=0.006),
    "pca": Format("pca.png", write=write_components, source="features", bytes_a_pixel=0.02),
    "npz": Format("attention.npz", write=write_numbers, bytes_a_pixel=0.01),
    "coco": Format(note=annotation, gather=gather_coco, own_size=True),
    "gif": Format(keep=keep_maps, gather=gather_animations),
    "mp4": Format(keep=keep_maps, gather=gather_animations, require=need_av),
}
"""Format by name."""


class File(NamedTuple):
    """A file of one picture."""

    kind: str
    label: str
    """The map that it shows; empty when it is about all maps."""
    name: str
    """Relative to the output folder."""


def attentive(formats: Iterable[str]) -> bool:
    """Whether any of these formats shows attention, which needs a CLS token."""
    return any(FORMATS[kind].source == "attention" for kind in formats)


def files_of(drawing: Drawing, name: str, heads: int, size: tuple[int, int]) -> Iterator[File]:
    """The files of the picture `name`, of `size` (H, W), as `draw` writes them."""
    chosen = {kind: row for kind, row in FORMATS.items() if kind in drawing.formats}
    for label in drawing.labels(heads):
        for kind, row in chosen.items():
            if row.paint:
                ending = "" if "." in row.suffix else drawing.overlay_ending(size)
                yield File(kind, label, f"{name}_{label}_{row.suffix}{ending}")
    for kind, row in chosen.items():
        if row.write:
            yield File(kind, "", f"{name}_{row.suffix}")


def draw(seen: Seen, name: str) -> dict[str, Any]:
    """Write the files of one picture; returns what files about all pictures will need."""
    drawing = seen.drawing
    chosen = {kind: FORMATS[kind] for kind in FORMATS if kind in drawing.formats}
    paths = {
        (kind, label): os.path.join(drawing.output, file)
        for kind, label, file in files_of(drawing, name, len(seen.heads), seen.size)
    }
    kept: dict[str, Any] = {}
    for kind, row in chosen.items():
        if row.write:
            row.write(Path(paths[kind, ""]), seen)
        if row.keep:
            kept |= row.keep(seen)
    for own_size in (False, True):
        rows = {kind: row for kind, row in chosen.items() if (row.paint or row.note) and row.own_size == own_size}
        if rows:
            _draw_maps(seen, rows, paths, seen.picture if own_size else seen.drawn, kept)
    return kept


def _draw_maps(
    seen: Seen,
    rows: dict[str, Format],
    paths: dict[tuple[str, str], str],
    picture: np.ndarray,
    kept: dict[str, Any],
) -> None:
    """Write the files of each map at the size of `picture` (C, H, W), and add the notes to `kept`."""
    shown, labels = render.as_picture(picture), seen.labels
    step = max(1, STRIP // (picture.shape[1] * picture.shape[2]))
    for start in range(0, len(labels), step):
        here = labels[start : start + step]
        level, masks = seen.drawing.shades(seen.small[start : start + step], picture)
        for kind, row in rows.items():
            if row.paint:
                for label, pixels in zip(here, row.paint(shown, level, masks), strict=True):
                    path = paths[kind, label]
                    (write_jpeg if path.endswith(".jpg") else write_png)(path, pixels)
            if row.note:
                notes = kept.setdefault(kind, [])
                notes += [{"head": column(label)} | row.note(mask) for label, mask in zip(here, masks, strict=True)]


def check_formats(formats: Sequence[str]) -> None:
    """UserError when a library that a format needs is not installed."""
    for kind in formats:
        if (require := FORMATS[kind].require) is not None:
            require(f"format {kind}")
