"""Where each image of a folder of shards lies: the index that makes a sample of a tar file one read at an offset.

A shard is an uncompressed tar file in the layout of the webdataset package. Members that share KEY, a name up to the
first dot of its last part, are one sample (`choose_images` says what becomes of names with more dots). Its image is the
member whose extension is one of `decode.EXTENSIONS`; its label the text of a `.cls` member, else what a `.json` member
has under "label" or "cls".

`index.npz` in the folder of the shards holds what `scan` found in each of them. `vit-suite make_shards` writes it. A
set without it gets one when it is first opened, from the headers in the shards: sets of others need no conversion.
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
from typing import Any, NamedTuple

import numpy as np

from vit_suite.data.decode import EXTENSIONS
from vit_suite.errors import UserError, counted, short
from vit_suite.files import locked, write_atomically

log = logging.getLogger("vit_suite")

INDEX, LOCK = "index.npz", ".index.lock"
MOST_LABEL = 1_000_000
"""Bytes of a .cls or .json member; captions and boxes may stand in it too."""
BLOCK = tarfile.BLOCKSIZE
READERS = 16
"""Shards whose headers are read at a time: a network disk answers many requests as fast as one."""


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
    """Shard name -> its images, for the shards `names` of `folder`. Shards that the index lacks are read and added to
    it.

    Raises UserError when the index and the files disagree, and with `whole` when a shard that it has is not in the
    folder.
    """
    file = folder / INDEX
    known = _known(file)
    if not known.keys() >= set(names):
        # If several ranks start together, one reads the headers and the others find its index.
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
    """`known` and the missing ones of the shards `names`; all are written to `file` if that is allowed."""
    new = [name for name in names if name not in known]
    if not new:
        return known
    log.info("reading the headers of %s in %s, which %s lacks", counted(len(new), "shard"), file.parent, INDEX)
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
    arrays: dict[str, Any] = {key: np.concatenate([getattr(shard, key) for shard in ordered.values()]) for key in TYPES}
    arrays["shards"] = np.array([os.fsencode(name) for name in ordered], dtype=np.bytes_)
    arrays["lengths"] = np.array([shard.length for shard in ordered.values()], dtype=np.int64)
    arrays["counts"] = np.array([len(shard.names) for shard in ordered.values()], dtype=np.int64)

    def save(path: Path) -> None:
        with path.open("wb") as handle:  # given a name, numpy would add .npz to it
            np.savez(handle, **arrays)

    write_atomically(file, save)


def read_index(file: Path) -> dict[str, Shard]:
    """The shards of a file that `write_index` wrote. UserError if it is damaged, or no such file."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            ends = stored["counts"].cumsum()[:-1]
            columns = [np.split(stored[key].astype(dtype, copy=False), ends) for key, dtype in TYPES.items()]
            names, lengths = stored["shards"].tolist(), stored["lengths"].tolist()
        shards = {os.fsdecode(name): Shard(*row) for name, *row in zip(names, lengths, *columns, strict=True)}
        for shard in shards.values():
            inside = (shard.offsets >= BLOCK) & (shard.sizes >= 0) & (shard.sizes <= shard.length)
            if not bool((inside & (shard.offsets <= shard.length - shard.sizes)).all()):
                raise ValueError("an image lies outside of its shard")
        return shards
    except PermissionError:
        raise
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        what = f"is damaged, or no index of shards ({type(error).__name__})"
        raise UserError(f"'{file}' {what}; delete it, and it is made again from the shards.") from None


class _Member(NamedTuple):
    """A file of a shard that may be an image."""

    name: str
    header: int
    """CRC-32 of the block before it."""
    offset: int
    size: int


def scan(path: Path) -> Shard:
    """Read the headers and labels of a shard. UserError when it is not a whole tar file, or has members but no image.

    Hard and symbolic links within the shard are followed. Members that become no sample are counted and said.
    """
    if not path.is_file():  # opening a pipe would wait for a writer
        raise UserError(f"shard '{path}' is no regular file (a broken link, or a pipe).")
    pictures: list[_Member] = []
    labels: dict[str, str] = {}
    links: list[tuple[str, str]] = []
    places: dict[str, _Member] = {}
    found: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.islnk() or member.issym():
                    below = "" if member.islnk() else os.path.dirname(member.name)
                    links.append((member.name, os.path.normpath(os.path.join(below, member.linkname))))
                    continue
                if not member.isfile():
                    continue
                _, extension = split_name(member.name)
                found.add(extension)
                if last_ending(extension) in EXTENSIONS:
                    tar.fileobj.seek(member.offset_data - BLOCK)
                    header = zlib.crc32(tar.fileobj.read(BLOCK))
                    one = _Member(member.name, header, member.offset_data, member.size)
                    places[os.path.normpath(member.name)] = one
                    pictures.append(one)
                elif last_ending(extension) in (".cls", ".json"):
                    _read_label(tar, member, path, labels)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # tarfile takes a file that just stops for a whole one
                raise tarfile.ReadError(f"it stops, or is damaged, at byte {tar.offset}")
    except (tarfile.TarError, OverflowError, EOFError) as error:
        raise UserError(
            f"shard '{path}' is not a whole uncompressed tar file ({error}); copy or make it again."
        ) from None
    left_out = [name for name, target in links if target not in places and is_picture(name)]
    pictures += [places[target]._replace(name=name) for name, target in links if target in places and is_picture(name)]
    images, more = choose_images(pictures)
    left_out += more
    if left_out:
        shown = ", ".join(short(name) for name in left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        log.warning("shard '%s': %d images are left out, as a second one of a sample, or a broken link: %s", path,
                    len(left_out), shown)  # fmt: skip
    if found and not images:
        expected = "expected KEY.jpg, .png, .webp or another image, with KEY.cls or KEY.json"
        raise UserError(f"shard '{path}' holds no images: {expected}; found {', '.join(sorted(found)[:6])}.")
    length, rows = path.stat().st_size, list(images.items())
    columns = {
        "names": [os.fsencode(one.name) for _, one in rows],
        "headers": [one.header for _, one in rows],
        "offsets": [one.offset for _, one in rows],
        "sizes": [one.size for _, one in rows],
        "labels": [labels.get(key, "").encode() for key, _ in rows],
    }
    return Shard(length, *(np.array(columns[key], kind) for key, kind in TYPES.items()))


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, labels: dict[str, str]) -> None:
    """Store the label of a `.cls` or `.json` member under its keys: names are cut in two ways, see `choose_images`."""
    key, extension = split_name(member.name)
    ending = last_ending(extension)
    keys = {key + extension.removesuffix(ending)} | ({key} if extension == ending else set())
    if ending == ".json" and all(key in labels for key in keys):
        return
    if member.size > MOST_LABEL:
        raise UserError(
            f"'{path}/{short(member.name)}' has {member.size:,} bytes; expected a label of at most {MOST_LABEL:,}."
        )
    content = tar.extractfile(member)
    text = _label(content.read() if content else b"", ending, f"'{path}/{member.name}'")
    for key in keys:
        if ending == ".cls" or key not in labels:
            labels[key] = text


def last_ending(extension: str) -> str:
    """`.seg.png` -> `.png`."""
    return "." + extension.rpartition(".")[2] if extension else ""


def is_picture(name: str) -> bool:
    """Whether a member's ending is an image's."""
    return last_ending(split_name(name)[1]) in EXTENSIONS


def choose_images(members: Sequence[_Member]) -> tuple[dict[str, _Member], list[str]]:
    """(key -> its image, names of members that are left out).

    A key ends at the first dot of a name, as in webdataset: `a.jpg` is the image of `a`, and `a.seg.png` beside it is
    another field. Where no member is the image of `a` by that rule, as of `IMG.2020.jpg` and `IMG.2021.jpg`, names are
    cut at the last dot. Of two images of one key (jpg and png) the first counts.
    """
    images: dict[str, _Member] = {}
    left_out: list[str] = []
    later = []
    for member in members:
        key, extension = split_name(member.name)
        if extension not in EXTENSIONS:
            later.append(member)
        elif images.setdefault(key, member) is not member:
            left_out.append(member.name)
    plain = set(images)
    for member in later:
        key, extension = split_name(member.name)
        if key in plain:  # a field of that sample
            continue
        if images.setdefault(key + extension.removesuffix(last_ending(extension)), member) is not member:
            left_out.append(member.name)
    return images, left_out


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `.seg.png`), as webdataset splits names; a hidden file has no key."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)?", name)
    return (match[1], (match[2] or "").lower()) if match else ("", name)


def _label(content: bytes, extension: str, what: str) -> str:
    try:
        text = content.decode().strip()
        if extension == ".cls":
            return _whole(text)
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON, which recurses once a level
        raise UserError(f"{what} is not readable text of a label ({short(str(error))}).") from None
    value = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(f"{what} has the label {str(value)[:60]}; expected a number or a word.")
    return str(value).strip()


def _whole(text: str) -> str:
    """`3.0` -> `3`; other text as it is."""
    return text.partition(".")[0] if re.fullmatch(r"\d+\.0*", text) else text
