"""Where each image of a folder of shards lies: the index that makes a sample of a tar file one read at an offset.

A shard is an uncompressed tar file in the layout of the webdataset package. Members that share KEY, a name up to the
first dot of its last part, are one sample. Its image is the member whose extension, all that follows that dot, is one
of `decode.EXTENSIONS`; its label the text of a `.cls` member, else what a `.json` member has under "label" or "cls".

`index.npz` in the folder of the shards holds what `scan` found in each of them. It is written by
`scripts/make_shards.py`, or when a
set is first opened, from the headers in the shards: other sets in this layout need no conversion.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_suite.data.decode import EXTENSIONS
from vit_suite.errors import UserError, short
from vit_suite.files import locked, write_atomically

log = logging.getLogger("vit_suite")

INDEX, LOCK = "index.npz", ".index.lock"
MOST_LABEL = 1_000_000
"""Bytes of a .cls or .json member; captions and boxes may stand in it too."""
BLOCK = tarfile.BLOCKSIZE
READERS = 16  # shards whose headers are read at a time: a network disk answers many questions as fast as one


class Shard(NamedTuple):
    """The images of a shard, n of them, in the order of the file."""

    length: int
    """Bytes of the file."""
    names: np.ndarray
    """Member names, bytes (n,)."""
    headers: np.ndarray
    """CRC-32 of the header block that stands before the image, uint32 (n,): tells when a shard was rewritten."""
    offsets: np.ndarray
    """Where the image begins, int64 (n,)."""
    sizes: np.ndarray
    """Its bytes, int64 (n,)."""
    labels: np.ndarray
    """A number or a word as UTF-8 bytes (n,), empty without a label."""


TYPES = {"names": np.bytes_, "headers": np.uint32, "offsets": np.int64, "sizes": np.int64, "labels": np.bytes_}


def open_index(folder: Path, names: Sequence[str], whole: bool) -> dict[str, Shard]:
    """Shard name -> its images, for the shards `names` of `folder`; those that the index lacks are read, and added to
    it.

    Raises UserError when the index and the files disagree, and with `whole` when a shard that it has is not in the
    folder.
    """
    file = folder / INDEX
    known = _known(file)
    if not known.keys() >= set(names):
        # Of the ranks that start together one reads the headers, and the others find what it wrote.
        with locked(folder / LOCK) if os.access(folder, os.W_OK) else nullcontext():
            known = _complete(file, _known(file), names)
    again = f"delete '{file}' and it is made again from the shards there are"
    gone = [name for name in known if not (folder / name).is_file()] if whole else []
    if gone:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise UserError(
            f"shard '{folder / gone[0]}'{more} is missing, but {INDEX} names it: bring it back, or {again}."
        )
    for name in names:
        length = (folder / name).stat().st_size
        if length != known[name].length:
            what = f"has {length} bytes, but {known[name].length} in {INDEX}: it is cut off, or was written again"
            raise UserError(f"shard '{folder / name}' {what}. Bring the first one back, or {again}.")
    return {name: known[name] for name in names}


def _known(file: Path) -> dict[str, Shard]:
    return read_index(file) if file.is_file() else {}


def _complete(file: Path, known: dict[str, Shard], names: Sequence[str]) -> dict[str, Shard]:
    """`known` with the shards of `names` that it lacks; written to `file` where that is allowed."""
    new = [name for name in names if name not in known]
    if not new:
        return known
    log.info("reading the headers of %d shards in %s, which %s lacks", len(new), file.parent, INDEX)
    with ThreadPoolExecutor(min(READERS, len(new))) as pool:
        known |= zip(new, pool.map(lambda name: scan(file.parent / name), new), strict=True)
    try:
        write_index(file, known)
    except OSError as error:
        reason = error.strerror or error
        log.warning("%s cannot be written (%s): every start reads the headers of the shards again", file, reason)
    return known


def write_index(file: Path, shards: dict[str, Shard]) -> None:
    """Write all of `shards`, sorted by name: equal shards give equal bytes."""
    ordered = dict(sorted(shards.items()))
    arrays = {key: np.concatenate([getattr(shard, key) for shard in ordered.values()]) for key in TYPES}
    arrays["shards"] = np.array([os.fsencode(name) for name in ordered], dtype=np.bytes_)
    arrays["lengths"] = np.array([shard.length for shard in ordered.values()], dtype=np.int64)
    arrays["counts"] = np.array([len(shard.names) for shard in ordered.values()], dtype=np.int64)

    def save(path: Path) -> None:
        with path.open("wb") as handle:  # given a name, numpy would add .npz to it
            np.savez(handle, **arrays)

    write_atomically(file, save)


def read_index(file: Path) -> dict[str, Shard]:
    """What `write_index` wrote. UserError when the file is damaged or something else's."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            ends = stored["counts"].cumsum()[:-1]
            columns = [np.split(stored[key].astype(dtype, copy=False), ends) for key, dtype in TYPES.items()]
            names, lengths = stored["shards"].tolist(), stored["lengths"].tolist()
        return {os.fsdecode(name): Shard(*row) for name, *row in zip(names, lengths, *columns, strict=True)}
    except PermissionError:
        raise
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        what = f"is damaged, or no index of shards ({type(error).__name__})"
        raise UserError(f"'{file}' {what}; delete it, and it is made again from the shards.") from None


def scan(path: Path) -> Shard:
    """Read the headers and labels of a shard. UserError when it is not a whole tar file, or has members but no
    image."""
    images: dict[str, tuple[bytes, int, int, int]] = {}  # key -> name, header, offset, size
    labels: dict[str, str] = {}
    found: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, extension = split_name(member.name)
                found.add(extension)
                if extension in EXTENSIONS:
                    if key in images:
                        raise UserError(
                            f"shard '{path}': sample {key} has two images, {os.fsdecode(images[key][0])} and"
                            f" {member.name}."
                        )
                    tar.fileobj.seek(member.offset_data - BLOCK)
                    header = zlib.crc32(tar.fileobj.read(BLOCK))
                    images[key] = os.fsencode(member.name), header, member.offset_data, member.size
                elif extension == ".cls" or (extension == ".json" and key not in labels):
                    if member.size > MOST_LABEL:
                        raise UserError(
                            f"'{path}/{short(member.name)}' has {member.size:,} bytes; expected a label of at most"
                            f" {MOST_LABEL:,}."
                        )
                    labels[key] = _label(tar.extractfile(member).read(), extension, f"'{path}/{member.name}'")
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # tarfile takes a file that just stops for a whole one
                raise tarfile.ReadError(f"it stops, or is damaged, at byte {tar.offset}")
    except tarfile.TarError as error:
        raise UserError(
            f"shard '{path}' is not a whole uncompressed tar file ({error}); copy or make it again."
        ) from None
    if found and not images:
        expected = "expected KEY.jpg, .png, .webp or another image, with KEY.cls or KEY.json"
        raise UserError(f"shard '{path}' holds no images: {expected}; found {', '.join(sorted(found)[:6])}.")
    names, headers, offsets, sizes = zip(*images.values(), strict=True) if images else ((), (), (), ())
    words = [labels.get(key, "").encode() for key in images]
    columns = zip((names, headers, offsets, sizes, words), TYPES.values(), strict=True)
    return Shard(path.stat().st_size, *(np.array(values, dtype) for values, dtype in columns))


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `.seg.png`), as webdataset splits names; a hidden file has no key."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)?", name)
    return (match[1], (match[2] or "").lower()) if match else ("", name)


def _label(content: bytes, extension: str, what: str) -> str:
    try:
        text = content.decode().strip()
        if extension == ".cls":
            return text
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON, which recurses once a level
        raise UserError(f"{what} is not readable text of a label ({short(str(error))}).") from None
    value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{what} has the label {str(value)[:60]}; expected a number or a word.")
    return str(value).strip()
