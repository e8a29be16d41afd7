"""What an export wrote: manifest.csv, and the records it is put together from.

manifest.csv has a line for every file, in the order of the images, and these columns:

- image: path of the input (`NAME SPLIT[INDEX]` where a data set has no files); empty for files about all images
- height, width: of the image, in pixels
- kind: png (heat map), overlay, mask, labels, pca, npz, coco, gif, mp4
- head: mean, max, rollout, or a head's number from 0; empty where a file is not about one map
- file: path relative to the manifest
- threshold: share of the mass that the mask, or the mask's outline, keeps; empty where there is none
- status: `ok`; an image that does not decode has one line without kind and file, and the reason here

While an export runs, each rank appends a record of each image to a file of its own. Rank 0 merges the records in the
order of the images, so the result does not depend on the number of ranks. Only their offsets are held in memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vit_suite.files import plain_cell, safe_cell, write_atomically

NAME = "manifest.csv"
COLUMNS = ("image", "height", "width", "kind", "head", "file", "threshold", "status")
OK = "ok"


def read_manifest(path: str | Path) -> list[dict[str, str]]:
    """The lines of a manifest.csv, or of the one in a folder, by the names of `COLUMNS`; all values are text."""
    path = Path(path)
    with (path / NAME if path.is_dir() else path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [{name: plain_cell(value or "") for name, value in row.items()} for row in csv.DictReader(file)]


def write_manifest(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a manifest of `rows`. A column that a row does not have is empty."""

    def write(temporary: Path) -> None:
        # Names that are no UTF-8 stay as they are.
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            plain, quoted = (
                csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n", quoting=quoting)
                for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
            )
            plain.writeheader()
            for row in rows:
                cells = {name: safe_cell(value) for name, value in row.items()}
                # A reader takes a carriage return outside of quotes for the end of the line.
                odd = any(isinstance(cell, str) and "\r" in cell for cell in cells.values())
                (quoted if odd else plain).writerow(cells)

    write_atomically(path, write)


def column(label: str) -> str:
    """The name of a map as the column `head` shows it: head3 -> 3, mean -> mean."""
    return label.removeprefix("head")


def part(output: Path, rank: int) -> Path:
    """Where a rank keeps its records."""
    return output / f".part-{rank}.jsonl"


class Records:
    """The records of all ranks in the order of their `index`. It can be iterated over several times."""

    def __init__(self, output: Path, ranks: int) -> None:
        self.files = [part(output, rank).open("rb") for rank in range(ranks)]
        self.places: list[tuple[int, int, int]] = []  # (index, file, offset)
        for number, file in enumerate(self.files):
            offset = 0
            for line in file:
                self.places.append((json.loads(line)["index"], number, offset))
                offset += len(line)
        self.places.sort()

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, number, offset in self.places:
            self.files[number].seek(offset)
            yield json.loads(self.files[number].readline())

    def good(self) -> Iterator[dict[str, Any]]:
        """The records of the images that decode."""
        return (record for record in self if "error" not in record)

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def discard_parts(output: Path) -> None:
    """Delete all records, also those of a killed export, and `output` itself when it holds nothing else."""
    for path in output.glob(".part-*.jsonl"):
        path.unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
