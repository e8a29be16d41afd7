"""Packs a data set into shards: tar files in the WebDataset layout, which `data.name shards` reads.

A sample is NUMBER-NAME.jpg, with the bytes of its file, and NUMBER-NAME.cls, the number of its class. `classes.txt`
names the classes. The order is shuffled once, by the seed. Shards are written into a folder within the output and moved
out of it when all are whole.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vit_suite.config import MakeShardsConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.registry import open_split
from vit_suite.data.shard_index import INDEX, open_index
from vit_suite.data.shards import CLASSES, ShardSource
from vit_suite.data.source import FileSource, ImageSource, stable_seed
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.logs import progress_bar

PARTIAL = ".partial"
SHARD_MB = 256
"""MiB of a shard where the options say nothing: large enough for a disk that is slow at random reads, small enough that
many workers share a set."""
LONGEST_STEM = 60
"""Letters of a file's name that its sample keeps."""
Member = tuple[str, bytes]
"""(name, content) of a file in a tar."""


@dataclass
class Packed:
    """What was written."""

    images: int = 0
    shards: int = 0
    size: int = 0
    """Bytes of all shards."""
    left_out: list[str] = field(default_factory=list)
    """A sentence for each file that could not be read."""


def pack(cfg: MakeShardsConfig) -> Packed:
    """Write the shards of `cfg.data` into `cfg.output`. UserError for wrong input; then nothing changes there."""
    if cfg.shard_mb and cfg.shard_images:
        raise UserError("shard_mb and shard_images are both given: a shard has a largest size or a number of images.")
    if not cfg.data.name:
        raise UserError("no images to pack: give a data set with --data.name, such as --data.name folder.")
    output, packed = Path(cfg.output), Packed()
    splits = open_splits(cfg)
    check_output(output, cfg.overwrite)
    unfinished = output / PARTIAL  # on the disk of the shards, so that moving them is renaming
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for source in splits:
            write_split(source, unfinished, cfg, packed.left_out)
        if splits[0].classes:
            (unfinished / CLASSES).write_text("".join(map(_line, splits[0].classes)), encoding="utf-8")
        shards = open_index(unfinished, sorted(path.name for path in unfinished.glob("*.tar")), whole=True)
        move(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    packed.images = sum(len(shard.names) for shard in shards.values())
    packed.shards, packed.size = len(shards), sum(shard.length for shard in shards.values())
    return packed


def _line(name: str) -> str:
    """A class name as a line of classes.txt, whose readers strip spaces: those at its ends are escaped."""
    return re.sub("^ +| +$", lambda found: r"\x20" * len(found[0]), name) + "\n"


def open_splits(cfg: MakeShardsConfig) -> list[ImageSource]:
    """The sources to pack: those of `splits`, else train and, where there is another, the one that is scored."""
    data = cfg.data.whole(cfg.channels)
    if cfg.splits:
        return [open_split(data, split) for split in dict.fromkeys(cfg.splits)]
    train = open_split(data, "train")
    try:
        scored = open_split(data, None)
    except UserError:  # it has none
        return [train]
    return [train] if scored.split == train.split else [train, scored]


def check_output(output: Path, overwrite: bool) -> None:
    """UserError when the output holds shards and not `overwrite`, or when it holds anything else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output '{output}' is a file; expected a folder.")
    entries = sorted(path.name for path in output.iterdir() if path.name != PARTIAL)
    others = [name for name in entries if not (name.endswith(".tar") or name in (INDEX, CLASSES))]
    if others:
        raise UserError(
            f"output '{output}' holds other things than shards ({', '.join(others[:3])}): name another folder."
        )
    if entries and not overwrite:
        raise UserError(
            f"output '{output}' holds {len(entries)} files ({entries[0]}, ...): name another folder, or give"
            " --overwrite."
        )


def move(unfinished: Path, output: Path) -> None:
    """Put what is in `unfinished` into `output`, in place of the shards there.

    The index goes first: while shards that it names are missing, a reader refuses the set.
    """
    os.replace(unfinished / INDEX, output / INDEX)
    for path in output.iterdir():
        if path.name not in (PARTIAL, INDEX):
            path.unlink()
    for path in sorted(unfinished.iterdir()):
        os.replace(path, output / path.name)


def write_split(source: ImageSource, folder: Path, cfg: MakeShardsConfig, left_out: list[str]) -> None:
    """Write SPLIT-000000.tar, SPLIT-000001.tar, ... into `folder`; what cannot be read is added to `left_out`."""
    limit = sys.maxsize if cfg.shard_images else (cfg.shard_mb or SHARD_MB) * 2**20
    generator = torch.Generator().manual_seed(stable_seed("make_shards", source.split, cfg.seed))
    order = range(len(source)) if cfg.keep_order else torch.randperm(len(source), generator=generator).tolist()
    progress = progress_bar(order, source.split, "image", leave=True)
    samples = readable(source, progress, left_out)
    for number, part in enumerate(split_up(samples, limit, cfg.shard_images or sys.maxsize)):
        write_atomically(folder / f"{source.split}-{number:06d}.tar", partial(write_tar, samples=part))


def readable(source: ImageSource, order: Iterable[int], left_out: list[str]) -> Iterator[list[Member]]:
    """The samples in this order; what cannot be read is added to `left_out`."""
    place = 0
    for index in order:
        try:
            yield sample(source, index, place)
        except (UserError, DecodeError) as error:
            left_out.append(str(error))
            continue
        place += 1


def split_up(samples: Iterable[list[Member]], limit: int, count: int) -> Iterator[Iterator[list[Member]]]:
    """Samples in parts of at most `count` samples and at most `limit` bytes as tar. A larger sample is a part of its
    own.

    One sample is in memory at a time: a part has to be read to its end before the next one is asked for.
    """
    samples = iter(samples)
    waiting = next(samples, None)

    def part() -> Iterator[list[Member]]:
        nonlocal waiting
        size, taken = tarfile.RECORDSIZE, 0  # the end mark
        while waiting is not None:
            # A header block for each member, and its content rounded up to whole blocks.
            size += sum(tarfile.BLOCKSIZE * (1 - -len(content) // tarfile.BLOCKSIZE) for _, content in waiting)
            if taken and (size > limit or taken == count):
                return
            yield waiting
            taken, waiting = taken + 1, next(samples, None)

    while waiting is not None:
        yield part()


def sample(source: ImageSource, index: int, place: int) -> list[Member]:
    """The members of an image: the encoded image and, where it has one, its label."""
    name, content = encoded(source, index)
    stem, extension = os.path.splitext(os.path.basename(name))
    key = f"{place:08d}-{re.sub(r'[^A-Za-z0-9_]+', '_', stem)[:LONGEST_STEM]}"  # no dot: a key ends at the first
    label = source.label(index)
    return [(key + extension.lower(), content)] + ([(f"{key}.cls", str(label).encode())] if label >= 0 else [])


def encoded(source: ImageSource, index: int) -> Member:
    """(file name, bytes) of an image: those of its file, else PNG or .npy of its pixels.

    UserError when its file cannot be read: a link that leads nowhere, a named pipe.
    """
    path = source.path(index)
    if isinstance(source, ShardSource):
        return path, source.content(index)
    if isinstance(source, FileSource):
        if not os.path.isfile(path):
            raise UserError(f"'{path}' of {source.title} is no file, or a link that leads nowhere.")
        try:
            return path, Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"'{path}' of {source.title} cannot be read: {error.strerror}.") from None
    pixels, buffer = source.load(index).numpy(), io.BytesIO()  # uint8 (C, H, W)
    if len(pixels) not in (1, 3):
        np.save(buffer, pixels)
        return f"{source.split}.npy", buffer.getvalue()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return f"{source.split}.png", buffer.getvalue()


def write_tar(path: Path, samples: Iterable[list[Member]]) -> None:
    """A tar file of `samples`, without the times and owners that would make two equal ones differ."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (member for members in samples for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
