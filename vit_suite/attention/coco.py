"""Format `coco`: masks as COCO annotations in one coco.json, with the run-length codes that pycocotools reads.

Source: github.com/cocodataset/cocoapi, common/maskApi.c. A mask is read column by column, as lengths of runs of 0 and 1
in turn, 0 first. Compression: from the fourth run on, a length is replaced by its difference to the length two runs
before. Each number is cut into groups of 5 bits, the lowest first. A sixth bit says that more groups follow, and 48 is
added to make a letter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vit_suite.attention.drawing import Export
from vit_suite.attention.manifest import Records
from vit_suite.files import write_atomically

CATEGORY = {"id": 1, "name": "object"}
NAME = "coco.json"


def runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of a bool mask (H, W), column by column, the first of zeros: int64."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], ends, [flat.size]]))
    return np.concatenate([[0], lengths]) if flat[0] else lengths


def compressed(lengths: np.ndarray) -> str:
    """Run lengths as COCO's letters."""
    rest = lengths.astype(np.int64)
    rest[3:] -= lengths[1:-2]
    letters, open_ = [], np.ones(len(rest), dtype=bool)
    while open_.any():
        bits, rest = rest & 31, rest >> 5
        more = np.where(bits & 16, rest != -1, rest != 0)  # until what is left is the sign alone
        letters.append(np.where(open_, bits + 32 * more + 48, 0))
        open_ = open_ & more
    text = np.stack(letters, 1).ravel()
    return text[text > 0].astype(np.uint8).tobytes().decode("ascii")


def annotation(mask: np.ndarray) -> dict[str, Any]:
    """The COCO annotation of a bool mask (H, W): segmentation, area in pixels, box [x, y, width, height]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [0, 0, 0, 0]
    if len(rows):
        box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    segmentation = {"size": list(mask.shape), "counts": compressed(runs(mask))}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}


def gather_coco(export: Export, records: Records, kind: str) -> list[dict[str, Any]]:
    """Write coco.json of all pictures; returns its line of the manifest.

    The id of an image is its number in the input, from 1. So ids do not move when a file does not decode.
    """
    drawing, pictures = export.drawing, export.pictures

    def entries() -> Iterator[tuple[dict, list[dict]]]:
        for record in records.good():
            index = record["index"]
            image = {"id": index + 1, "file_name": pictures.files[index]}
            yield image | {"height": record["height"], "width": record["width"]}, record[kind]

    info = {"description": "attention masks", "threshold": drawing.threshold, "upsample": drawing.mode}
    write_coco(drawing.output / NAME, info, entries)
    return [{"kind": kind, "file": NAME, "threshold": drawing.threshold}]


def write_coco(path: Path, info: Mapping[str, Any], pictures: Callable[[], Iterable[tuple[dict, list[dict]]]]) -> None:
    """Write a COCO file. `pictures()` yields the image entry (with an `id`) and the annotations of each picture.

    Annotations get `id`, `image_id` and category here. `pictures` is called twice, because COCO wants all images before
    all annotations; only one picture is held in memory.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(f'{{"info": {json.dumps(dict(info))},\n"categories": [{json.dumps(CATEGORY)}],\n"images": [')
            _list(file, (image for image, _ in pictures()))
            file.write('],\n"annotations": [')
            pairs = ((image["id"], found) for image, annotations in pictures() for found in annotations)
            _list(
                file,
                ({"id": i, "image_id": image, "category_id": 1} | found for i, (image, found) in enumerate(pairs, 1)),
            )
            file.write("]}\n")

    write_atomically(path, write)


def _list(file: TextIO, items: Iterable[dict]) -> None:
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))
