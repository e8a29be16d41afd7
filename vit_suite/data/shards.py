"""`shards`: sets as tar files in the WebDataset layout, for disks that give a few large files faster than millions of
small ones.

    ROOT/train-000000.tar ROOT/val-000000.tar ...    splits by name (also imagenet1k-validation-00.tar)
    ROOT/train/000000.tar ROOT/val/000000.tar ...    or by folder
    ROOT/000000.tar ...                              or one split, `all`, used for both ends
    ROOT/train-{000000..000127}.tar                  some shards, as webdataset writes them; or with *

Labels are numbers, or words that `classes.txt` beside the shards (one a line) puts into their order; it also names the
numbers. Any image is one read at an offset (`shard_index.py`), so training order, resume, ranks, evaluation and the
list of bad images are those of loose files; an image that does not decode is listed as SHARD.tar/KEY.jpg.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_suite.config import DataConfig
from vit_suite.data.decode import decode
from vit_suite.data.files import ALIASES, SPLITS, WHOLE, choose_split, split_folders
from vit_suite.data.listing import found_in, say_once
from vit_suite.data.shard_index import BLOCK, INDEX, Shard, open_index
from vit_suite.data.source import ImageSource, writable
from vit_suite.errors import UserError, quote, short
from vit_suite.files import printable

CLASSES = "classes.txt"
MOST_CLASSES = 1_048_576
"""A larger label is a slip, or hostile: it would make as many classes. ImageNet-22k has 21,841."""
OPEN = 64
"""Shards that a process keeps open, because opening is slow on a network disk. A process may often open only 1,024
files."""


class ShardSource(ImageSource):
    """Images in the shards of one folder. A few arrays, which workers share, hold where each image lies.

    `index`: what `open_index` returns. `read_ahead`: let the system read a whole shard when its first image is asked
    for. This suits `order.shard_order`, which reads a shard in one stretch, and would be waste in any other order.
    """

    def __init__(
        self,
        name: str,
        split: str,
        folder: str | os.PathLike,
        index: dict[str, Shard],
        channels: int,
        classes: list[str],
        labels: Tensor | None,
        read_ahead: bool = False,
    ) -> None:
        self.name, self.split, self.channels, self.classes, self.labels = name, split, channels, classes, labels
        self.folder, self.files, self.read_ahead = os.fspath(folder), list(index), read_ahead
        counts = torch.tensor([len(shard.names) for shard in index.values()])
        self.shards = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.names, self.headers, self.offsets, self.sizes = (
            np.concatenate([getattr(shard, key) for shard in index.values()])
            for key in ("names", "headers", "offsets", "sizes")
        )
        _open.cache_clear()  # a set that is opened sees its files as they are now

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Tensor:
        pixels = decode(self.path(index), self.channels, self.content(index), self.reading)
        return torch.from_numpy(writable(pixels))

    def path(self, index: int) -> str:
        return os.path.join(self._shard(index), os.fsdecode(self.names[index]))

    def content(self, index: int) -> bytes:
        """The file of image `index` as it was put into the shard. UserError when the shard is gone or has changed."""
        path, offset, size = self._shard(index), int(self.offsets[index]), int(self.sizes[index])
        try:
            block = _open(path, self.read_ahead, os.getpid()).read(BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise UserError(f"shard '{path}' cannot be read: {error.strerror}.") from None
        if len(block) < BLOCK + size or zlib.crc32(block[:BLOCK]) != self.headers[index]:
            where = f"{os.fsdecode(self.names[index])} is not at byte {offset} any more"
            index_file = os.path.join(self.folder, INDEX)
            raise UserError(
                f"shard '{path}' was written again since it was indexed ({where}): delete '{index_file}' and start"
                " anew."
            )
        return block[BLOCK:]

    def _shard(self, index: int) -> str:
        assert self.shards is not None
        return os.path.join(self.folder, self.files[int(self.shards[index])])


class _OpenFile:
    """A file descriptor that is closed when nobody refers to it: threads may still read a shard that `_open` has
    dropped."""

    def __init__(self, path: str, read_ahead: bool, process: int) -> None:
        """`process`: number of the process that reads. It makes a forked process open the file again. If both shared a
        descriptor, one could close it while the other reads, or its number could come to mean another file."""
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # else Windows changes line ends
        self.lock = threading.Lock()
        weakref.finalize(self, os.close, self.number)
        if read_ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_WILLNEED)

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes from byte `offset` on; fewer at the end of the file. Several threads may ask at once."""
        if hasattr(os, "pread"):
            return os.pread(self.number, count, offset)
        with self.lock:  # Windows: one position for all who read
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, count)


_open = functools.lru_cache(OPEN)(_OpenFile)


def open_shards(cfg: DataConfig, root: Path, split: str | None) -> ShardSource:
    """`shards`: the tar files of one split, by the layouts above."""
    if re.match(r"(pipe:|[a-z][a-z0-9+]+:/)", str(root)):
        raise UserError(f"data.root '{root}' is an address; shards are read at offsets, from a local or network disk.")
    splits = find_shards(root)
    only = list(splits) == [WHOLE] and split in (None, "train")
    chosen = WHOLE if only else choose_split(split, sorted(splits, key=[*SPLITS, WHOLE].index), f"'{root}'")
    folder = splits[chosen][0].parent
    index = open_index(folder, [path.name for path in splits[chosen]], whole=root.is_dir())
    words = np.concatenate([shard.labels for shard in index.values()])
    if not len(words):
        raise UserError(f"the {len(index)} shards of '{root}' ({chosen}) are empty.")
    names = next((place / CLASSES for place in (folder, root) if (place / CLASSES).is_file()), None)
    classes, labels = number_labels(words, names, folder)
    name = (root if root.is_dir() else folder).resolve().name
    return ShardSource(name, chosen, folder, index, cfg.channels, classes, labels, cfg.order == "shards")


def find_shards(root: Path) -> dict[str, list[Path]]:
    """Split -> its shards, sorted by name (a pattern keeps its order). UserError when there are none, or one of a
    pattern is missing."""
    if root.is_dir():
        folders = {split: tars for split, folder in split_folders(root).items() if (tars := sorted(_tars(folder)))}
        if folders:
            return folders
        paths = sorted(_tars(root))
    else:
        paths = _expand(root)
    if not paths:
        layout = (
            "NAME-000000.tar files in ROOT or in ROOT/train and ROOT/val, or a pattern such as"
            " ROOT/train-{000000..000127}.tar"
        )
        hint = "; .tar.gz and .tgz have to be unpacked to .tar first" if any(root.glob("*.t*gz")) else ""
        raise UserError(f"no shards in '{root}': expected {layout}, found {found_in(root)}{hint}.")
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(_split_of(path.name), []).append(path)
    return found


def _tars(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name.endswith(".tar") and not path.name.startswith("."))


def _expand(pattern: Path) -> list[Path]:
    """The files of `DIR/train-{000000..000127}.tar` or `DIR/train-*.tar`; ranges and * stand in the file name."""
    folder = pattern.parent
    if not folder.is_dir():
        raise UserError(
            f"data.root '{pattern}': the folder '{folder}' does not exist (a pattern may stand in the file name alone)."
        )
    if "*" in pattern.name:
        return sorted(path for path in folder.glob(pattern.name) if not path.name.startswith("."))
    paths = [folder / name for name in _ranges(pattern.name)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"data.root '{pattern}' names {len(paths)} shards, but {missing[0]}{more} does not exist in '{folder}'."
        )
    return paths


def _ranges(name: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if match is None:
        yield name
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _ranges(f"{name[: match.start()]}{number:0{len(match[1])}d}{name[match.end() :]}")


def _split_of(name: str) -> str:
    """`imagenet1k-validation-00.tar` -> val; `all` where no part of the name is a split's."""
    parts = (ALIASES.get(part, part) for part in re.split(r"[-_.]", name.lower()))
    return next((part for part in parts if part in SPLITS), WHOLE)


def number_labels(words: np.ndarray, names: Path | None, folder: Path) -> tuple[list[str], Tensor | None]:
    """(class names, labels int64 (N,)) from labels as bytes (N,) and the file of class names; labels are None if no
    image has one.

    Without a file of names the classes are called by their numbers. UserError for a label that is not among the names,
    and for a word if there are no names.
    """
    classes = (
        []
        if names is None
        else [printable(line.strip()) for line in names.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    )
    table = {b"": -1} | {name.encode(): number for number, name in enumerate(classes) if not name.isdecimal()}
    for word in dict.fromkeys(words.tolist()):
        if word.isdigit():
            if len(word) > 19 or int(word) >= MOST_CLASSES:
                raise UserError(
                    f"the shards in '{folder}' have the label {quote(os.fsdecode(word))}; labels count"
                    f" classes from 0, at most {MOST_CLASSES:,} of them."
                )
            table[word] = int(word)
        elif word not in table:
            need = (
                f"'{names}' does not have"
                if names
                else f"needs its number: name the classes, one a line, in '{folder / CLASSES}'"
            )
            raise UserError(f"the shards in '{folder}' have the label '{short(os.fsdecode(word))}', which {need}.")
    labels = torch.tensor([table[word] for word in words.tolist()])
    most = int(labels.max())
    if names is None and 0 < int(labels[labels >= 0].min() if most >= 0 else 0):
        say_once(
            f"the labels of the shards in '{folder}' begin at {int(labels[labels >= 0].min())}: the classes below have"
            " no images, or the labels count from 1."
        )
    if most < 0:
        return [], None
    if names is not None and most >= len(classes):
        raise UserError(
            f"the shards in '{folder}' have the label {most}, but '{names}' names {len(classes)} classes, from 0 on."
        )
    return classes or [str(number) for number in range(most + 1)], labels
