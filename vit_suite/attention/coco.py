"""Masks as COCO annotations: run-length codes that pycocotools reads (github.com/cocodataset/cocoapi,
common/maskApi.c).

A mask is read column by column; runs of 0 and 1 take turns, 0 first. Compressed, each run (from the fourth on, its
difference to the one two before) is written in groups of 5 bits, lowest first, a sixth bit says that more follow, and
48 is added to make a letter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vit_suite.files import write_atomically

CATEGORY = {"id": 1, "name": "object"}


def runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of a bool mask (H, W), column-major, 0 first: int64."""
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
    """What COCO says of a bool mask (H, W): segmentation, area in pixels, box [x, y, width, height]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [0, 0, 0, 0]
    if len(rows):
        box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    segmentation = {"size": list(mask.shape), "counts": compressed(runs(mask))}
    return {"segmentation": segmentation, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}


def write_coco(path: Path, info: Mapping[str, Any], pictures: Callable[[], Iterable[tuple[dict, list[dict]]]]) -> None:
    """A COCO file of `pictures()`: each its image entry (with an `id`) and its annotations, which get `id`, `image_id`
    and category.

    `pictures` is called twice, and nothing but one picture is held: COCO wants all images before all annotations.
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
