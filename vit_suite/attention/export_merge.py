"""What rank 0 does when all images are drawn: the manifest, the list of failures, the COCO file, the animations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_suite import distributed
from vit_suite.attention import render
from vit_suite.attention.animate import write_animation
from vit_suite.attention.coco import write_coco
from vit_suite.attention.export_draw import Drawing, column, files_of, unpacked
from vit_suite.attention.export_options import ANIMATED
from vit_suite.attention.manifest import NAME, OK, Records, discard_parts, write_manifest
from vit_suite.data.decode import DecodeError
from vit_suite.data.inputs import Pictures
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.reading import prefetch
from vit_suite.errors import UserError

COCO = "coco.json"
FULL = 0.995
"""Share of all patches of all frames that are darker than the brightest color of an animation."""


@dataclass(frozen=True)
class Export:
    """What was exported."""

    drawing: Drawing
    pictures: Pictures
    heads: int
    """Of the backbone."""
    rate: float
    """Frames a second of an animation."""
    threads: int
    """That may draw at a time."""


def merge(summary: Any, export: Export) -> None:
    """Write the files about all pictures from the records of all ranks, and fill an `ExportSummary`.

    UserError when not one picture decoded: then nothing is left behind.
    """
    drawing, pictures, output = export.drawing, export.pictures, export.drawing.output
    records = Records(output, distributed.world_size())
    (output / "quarantine.txt").unlink(missing_ok=True)  # of an earlier export
    for record in records:
        if "error" in record:
            summary.failures.append(DecodeError(record["path"], record["error"]))
            continue
        summary.images += 1
        for name in ("shrunk", "coarse", "artifacts"):
            setattr(summary, name, getattr(summary, name) + record[name])
    summary.failures.extend(pictures.source.failures)  # folders that could not be listed
    try:
        if not summary.images:
            raise UserError(f"none of the {len(pictures)} images decodes; the first: {summary.failures[0]}")
        lines: list[dict[str, Any]] = []
        if "coco" in drawing.formats:
            _write_coco(drawing, pictures, records)
            lines.append({"kind": "coco", "file": COCO, "threshold": drawing.threshold})
        for kind in ANIMATED:
            if kind in drawing.formats:
                lines += _animate(kind, export, records)

        def rows() -> Iterator[dict[str, Any]]:
            yield from _rows(export, records)
            yield from (line | {"status": OK} for line in lines)

        write_manifest(output / NAME, (_counted(row, summary) for row in rows()))
        if summary.failures:
            summary.quarantine = output / "quarantine.txt"
            Quarantine(summary.quarantine, limit=1.0).report(summary.failures, "the images", len(pictures))
    finally:
        records.close()
        discard_parts(output)


def _counted(row: dict[str, Any], summary: Any) -> dict[str, Any]:
    if row["status"] == OK:
        summary.files[row["kind"]] += 1
    return row


def _rows(export: Export, records: Records) -> Iterator[dict[str, Any]]:
    """Lines of the manifest, picture by picture."""
    drawing, pictures = export.drawing, export.pictures
    for record in records:
        image = {"image": pictures.path(record["index"])}
        if "error" in record:
            yield image | {"status": record["error"]}
            continue
        image |= {"height": record["height"], "width": record["width"], "status": OK}
        for kind, label, name in files_of(drawing, pictures.names[record["index"]], export.heads):
            threshold = drawing.threshold if kind in ("overlay", "mask") else ""
            yield image | {"kind": kind, "head": column(label), "file": name, "threshold": threshold}


def _write_coco(drawing: Drawing, pictures: Pictures, records: Records) -> None:
    """coco.json: ids of images are their numbers in the input, from 1, so that they do not move when a file does not
    decode."""

    def entries() -> Iterator[tuple[dict, list[dict]]]:
        for record in records:
            if "error" not in record:
                index = record["index"]
                image = {
                    "id": index + 1,
                    "file_name": pictures.files[index],
                    "height": record["height"],
                    "width": record["width"],
                }
                yield image, record["annotations"]

    info = {"description": "attention masks", "threshold": drawing.threshold, "upsample": drawing.mode}
    write_coco(drawing.output / COCO, info, entries)


def _animate(kind: str, export: Export, records: Records) -> list[dict[str, Any]]:
    """An animation for each map, the pictures as frames; their lines of the manifest."""
    drawing = export.drawing
    drawn = [(record["index"], unpacked(record["maps"])) for record in records if "error" not in record]
    first = next(record for record in records if "error" not in record)
    lines = []
    for place, label in enumerate(drawing.labels(export.heads)):
        frames = [(index, small[place]) for index, small in drawn]
        name = f"animation_{label}.{kind}"
        draw = _frames(export, frames, (first["height"], first["width"]))
        write_animation(drawing.output / name, draw, len(frames), export.rate)
        lines.append({"kind": kind, "head": column(label), "file": name, "threshold": drawing.threshold})
    return lines


def _frames(
    export: Export, frames: list[tuple[int, Tensor]], size: tuple[int, int]
) -> Callable[[Sequence[int]], Iterator[np.ndarray]]:
    """Draws overlays of chosen frames in order, each at `size` (H, W): pictures of other sizes are resized, a video has
    one."""
    drawing, pictures, threads = export.drawing, export.pictures, export.threads
    # Not up to the very largest value: one bright patch in one frame would darken all others.
    values = np.concatenate([small.numpy().ravel() for _, small in frames])
    limits = float(values.min()), float(np.quantile(values, FULL))

    def overlay(number: int) -> np.ndarray:
        index, small = frames[number]
        picture = pictures.load(index)
        shown = np.ascontiguousarray(render.as_picture(picture))
        if shown.shape[:2] != size:
            shown = np.asarray(Image.fromarray(shown).resize(size[::-1], Image.Resampling.BICUBIC))
            picture = shown.transpose(2, 0, 1)
        with torch.no_grad():
            level, mask = drawing.shades(small[None], picture, limits)
        return render.overlay(shown, level[0], mask[0])

    return lambda numbers: prefetch(overlay, numbers, ahead=2 * threads, workers=threads)
