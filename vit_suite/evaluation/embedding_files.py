"""Embeddings on disk: which formats there are, how they are written, and how one is read again.

    .parquet    one row an image: path, label, class, height, width, embedding (a list of D float32); needs pyarrow
    .npz        arrays `embeddings` (N, D), `paths`, `labels`, `classes`, `sizes` (N, 2), and `protocol` (JSON)
    .npy        the array alone; the columns beside it in NAME.table.csv, the protocol in NAME.protocol.json
    .csv        one row an image: the columns, then e0 ... e(D-1); the protocol in NAME.protocol.json
    folder      patch tokens: 000000.npz ... with `tokens` float16 (gh, gw, D), table.csv, protocol.json
    .zarr       patch tokens: one float16 array (N, gh, gw, D), a chunk an image; table.csv, protocol.json inside

A label is -1 where an image has none, and its class is empty then. Every format is the same, byte for byte, for the
same rows.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit_suite.errors import UserError
from vit_suite.files import plain_cell, safe_cell, write_atomically

FORMATS = (".parquet", ".npz", ".npy", ".csv")
PATCH_FORMATS = ("", ".zarr")
HEADER = ["path", "label", "class", "height", "width"]


@dataclass(frozen=True)
class Columns:
    """What is known of each of N images."""

    paths: list[str]
    labels: np.ndarray
    """int64 (N,), -1 without a label."""
    classes: list[str]
    """Names of the labels, empty without one."""
    sizes: np.ndarray
    """int32 (N, 2): height and width in pixels of the file."""

    def rows(self) -> Iterable[list[Any]]:
        """The columns of each image, in the order of `HEADER`."""
        for path, label, name, size in zip(self.paths, self.labels, self.classes, self.sizes, strict=True):
            yield [path, int(label), name, int(size[0]), int(size[1])]


@dataclass(frozen=True)
class Embeddings:
    """A file of embeddings in memory."""

    path: Path
    features: Tensor
    """float32 (N, D)."""
    columns: Columns
    protocol: dict[str, Any]

    def __len__(self) -> int:
        return len(self.features)


def is_patch_output(output: Path) -> bool:
    """Whether the ending is that of a format for patch tokens."""
    return output.suffix.lower() in PATCH_FORMATS


def need_pyarrow() -> Any:
    """(pyarrow, pyarrow.parquet); UserError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("a .parquet file needs pyarrow: pip install 'vit-suite[embed]', or take .npz.") from None
    return pyarrow, parquet


def need_zarr() -> Any:
    """The zarr module; UserError when it is not installed."""
    try:
        import zarr
    except ImportError:
        raise UserError("a .zarr needs zarr: pip install 'vit-suite[embed]', or take a folder of .npz.") from None
    return zarr


class Writer:
    """Writes (N, D) embeddings, a part at a time: only one part is in memory."""

    def __init__(self, output: Path, columns: Columns, protocol: dict[str, Any]) -> None:
        self.output, self.columns, self.protocol = output, columns, protocol

    def write(self, parts: Iterable[np.ndarray], width: int) -> None:
        """`parts`: float32 (n, `width`) each, N rows in all. The file appears when it is whole."""
        writers = {".parquet": self._parquet, ".npz": self._npz, ".npy": self._npy, ".csv": self._csv}
        write = writers[self.output.suffix.lower()]
        write_atomically(self.output, lambda temporary: write(temporary, parts, width))
        if self.output.suffix.lower() == ".npy":
            write_table(self.output.with_suffix(".table.csv"), self.columns)
        if self.output.suffix.lower() in (".npy", ".csv"):
            write_json(self.output.with_suffix(".protocol.json"), self.protocol)

    def _parquet(self, path: Path, parts: Iterable[np.ndarray], width: int) -> None:
        arrow, parquet = need_pyarrow()
        schema = arrow.schema(
            [
                ("path", arrow.string()),
                ("label", arrow.int64()),
                ("class", arrow.string()),
                ("height", arrow.int32()),
                ("width", arrow.int32()),
                ("embedding", arrow.list_(arrow.float32(), width)),
            ],
            metadata={"vit_suite": json.dumps(self.protocol)},
        )
        start = 0
        with parquet.ParquetWriter(path, schema) as writer:
            for part in parts:
                here = slice(start, start + len(part))
                values = arrow.FixedSizeListArray.from_arrays(arrow.array(part.ravel()), width)
                sizes = self.columns.sizes[here]
                columns = [
                    arrow.array([os.fsencode(path).decode("utf-8", "replace") for path in self.columns.paths[here]]),
                    arrow.array(self.columns.labels[here]),
                    arrow.array(self.columns.classes[here], arrow.string()),
                    arrow.array(sizes[:, 0]),
                    arrow.array(sizes[:, 1]),
                    values,
                ]
                writer.write_table(arrow.Table.from_arrays(columns, schema=schema))
                start += len(part)

    def _npz(self, path: Path, parts: Iterable[np.ndarray], width: int) -> None:
        small = {
            "paths": np.array([os.fsencode(path).decode("utf-8", "replace") for path in self.columns.paths]),
            "labels": self.columns.labels,
            "classes": np.array(self.columns.classes),
            "sizes": self.columns.sizes,
            "protocol": np.array(json.dumps(self.protocol)),
        }
        # By hand, because numpy.savez wants the whole array. ZipInfo's own date is 1980: the bytes do not depend on
        # when the file is written.
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("embeddings.npy"), "w", force_zip64=True) as file:
                _write_rows(file, parts, (len(self.columns.paths), width))
            for name, array in small.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)

    def _npy(self, path: Path, parts: Iterable[np.ndarray], width: int) -> None:
        with path.open("wb") as file:
            _write_rows(file, parts, (len(self.columns.paths), width))

    def _csv(self, path: Path, parts: Iterable[np.ndarray], width: int) -> None:
        rows = iter(self.columns.rows())
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow([*HEADER, *(f"e{number}" for number in range(width))])
            for part in parts:
                writer.writerows(
                    [*map(safe_cell, next(rows)), *(f"{value:.9g}" for value in row)] for row in part.tolist()
                )


def _write_rows(file: Any, parts: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """A .npy file of float32 rows that come in parts."""
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype="<f4").tobytes())


class PatchFiles:
    """Patch tokens of each image in a file of its own: a .npz, or a chunk of a zarr array.

    folder: where they are written until all are there. images: how many there are, those that do not decode included.
    shape: (gh, gw, D) of an image's tokens. UserError for a .zarr where zarr is not installed.
    """

    def __init__(self, folder: Path, ending: str, images: int, shape: tuple[int, int, int]) -> None:
        self.folder, self.images, self.shape = folder, images, shape
        self.zarr: Any = need_zarr() if ending.lower() == ".zarr" else None
        self.array: Any = None

    def prepare(self) -> None:
        """Rank 0: make the folder. A .zarr that an earlier start began is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.zarr is not None:
            self._create(self.folder, self.images)

    def open(self) -> None:
        """Every rank, after `prepare`."""
        if self.zarr is not None:
            self.array = self.zarr.open_array(os.fspath(self.folder), mode="r+")

    def write(self, index: int, tokens: np.ndarray) -> None:
        """Tokens (gh, gw, D) of image `index`; called from several threads and ranks."""
        tokens = tokens.astype(np.float16)
        if self.array is not None:
            self.array[index] = tokens
            return

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, tokens=tokens)

        write_atomically(self.folder / f"{index:08d}.npz", write, sync=False)

    def finish(self, output: Path, numbers: np.ndarray, columns: Columns, protocol: dict[str, Any]) -> None:
        """Put everything in place as `output`. `numbers` (N,): images that have tokens."""
        folder, files = self.folder, None
        if self.zarr is None:
            files = [f"{number:08d}.npz" for number in numbers]
        else:
            folder = self._close_gaps(numbers)
        write_table(folder / "table.csv", columns, files)
        write_json(folder / "protocol.json", protocol)
        if output.is_dir() and not output.is_symlink():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)
        os.replace(folder, output)

    def _close_gaps(self, numbers: np.ndarray) -> Path:
        """A second array without the images that did not decode. Its chunks are moved there, not written again."""
        folder = self.folder.with_name("tokens.zarr")
        self._create(folder, len(numbers))
        for row, number in enumerate(numbers):
            chunk = self.folder / _chunk(number)
            if chunk.exists():  # an earlier start that was stopped here has moved it, or all of it is 0
                os.replace(chunk, folder / _chunk(row))
        return folder

    def _create(self, folder: Path, images: int) -> None:
        if (folder / "zarr.json").is_file():
            return
        self.zarr.create_array(
            store=os.fspath(folder),
            shape=(images, *self.shape),
            chunks=(1, *self.shape),
            dtype="float16",
            chunk_key_encoding={"name": "default", "separator": "."},  # "/" would make four files and folders an image
        )


def _chunk(row: int) -> str:
    """The file of an image's chunk."""
    return f"c.{row}.0.0.0"


def write_table(path: Path, columns: Columns, files: list[str] | None = None) -> None:
    """The columns as CSV, and where given the file of each image."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER + ["file"] * (files is not None))
            for number, row in enumerate(columns.rows()):
                writer.writerow([safe_cell(cell) for cell in (row if files is None else [*row, files[number]])])

    write_atomically(path, write)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A dictionary as indented JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def read_embeddings(path: str | Path) -> Embeddings:
    """The file that `Writer` wrote. UserError when there is none, or it is no file of embeddings."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"embeddings '{path}' is a folder; expected a {', '.join(FORMATS)} file of `vit-suite embed`.")
    if not path.is_file():
        raise UserError(f"embeddings '{path}' does not exist; `vit-suite embed` writes such a file.")
    readers = {".parquet": _read_parquet, ".npz": _read_npz, ".npy": _read_npy, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"embeddings '{path}' is not one of {', '.join(FORMATS)}.")
    try:
        features, columns, protocol = readers[path.suffix.lower()](path)
    except UserError:
        raise
    except Exception as error:  # pyarrow, numpy, zipfile and csv have an error for every way a file can be wrong
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"embeddings '{path}' is truncated, or no file of `vit-suite embed` ({cause}).") from error
    if features.ndim != 2 or len(features) != len(columns.paths) or not len(features):
        raise UserError(f"embeddings '{path}' holds {features.shape} numbers for {len(columns.paths)} images.")
    if not np.isfinite(features).all():
        raise UserError(f"embeddings '{path}' holds numbers that are not finite.")
    return Embeddings(path, torch.from_numpy(np.array(features, np.float32)), columns, protocol)


Read = tuple[np.ndarray, Columns, dict[str, Any]]


def _read_parquet(path: Path) -> Read:
    _, parquet = need_pyarrow()
    table = parquet.read_table(path)
    width = table.schema.field("embedding").type.list_size
    features = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    sizes = np.stack([table["height"].to_numpy(), table["width"].to_numpy()], 1)
    columns = Columns(table["path"].to_pylist(), table["label"].to_numpy(), table["class"].to_pylist(), sizes)
    return features, columns, json.loads(table.schema.metadata[b"vit_suite"])


def _read_npz(path: Path) -> Read:
    with np.load(path, allow_pickle=False) as stored:
        columns = Columns(
            stored["paths"].tolist(), stored["labels"], stored["classes"].tolist(), stored["sizes"].astype(np.int32)
        )
        return stored["embeddings"], columns, json.loads(str(stored["protocol"]))


def _read_npy(path: Path) -> Read:
    columns, _ = _read_table(path.with_suffix(".table.csv"))
    return np.load(path, allow_pickle=False), columns, _read_protocol(path)


def _read_csv(path: Path) -> Read:
    columns, rest = _read_table(path)
    return np.array(rest, dtype=np.float32), columns, _read_protocol(path)


def _read_table(path: Path) -> tuple[Columns, list[list[float]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        if next(reader)[: len(HEADER)] != HEADER:
            raise ValueError(f"its columns are not {', '.join(HEADER)}")
        rows = list(reader)
    sizes = np.array([[int(row[3]), int(row[4])] for row in rows], np.int32).reshape(-1, 2)
    labels = np.array([int(row[1]) for row in rows], np.int64)
    columns = Columns([plain_cell(row[0]) for row in rows], labels, [plain_cell(row[2]) for row in rows], sizes)
    return columns, [[float(value) for value in row[len(HEADER) :]] for row in rows]


def _read_protocol(path: Path) -> dict[str, Any]:
    beside = path.with_suffix(".protocol.json")
    return json.loads(beside.read_text()) if beside.is_file() else {}
