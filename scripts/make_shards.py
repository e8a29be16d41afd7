"""Packs a data set into shards: tar files in the WebDataset layout, which `data.name shards` reads, for disks that give
a few large files faster than millions of small ones.

    python scripts/make_shards.py --name folder --root PHOTOS --output SHARDS
    python scripts/make_shards.py --name imagenet --root /data/imagenet --output /lustre/imagenet --shard-mb 512

Files keep their bytes; images that lie in no file of their own (CIFAR's batches, generated ones) become PNG, or .npy
where they have neither 1 nor 3 channels. Each sample is NUMBER-NAME.jpg and NUMBER-NAME.cls, the number of its class;
`classes.txt` names the classes. The order is shuffled once, by --seed, so that a reader that goes from shard to shard
sees mixed classes. Equal input gives equal bytes. Boxes and masks stay behind.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vit_suite.config import DataConfig
from vit_suite.data.decode import DecodeError
from vit_suite.data.registry import DATASETS, open_split
from vit_suite.data.shard_index import INDEX, open_index
from vit_suite.data.shards import CLASSES, ShardSource
from vit_suite.data.source import FileSource, ImageSource, stable_seed
from vit_suite.errors import UserError
from vit_suite.files import write_atomically

PARTIAL = ".partial"
Member = tuple[str, bytes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the options, writes the shards into a folder within the output, and moves them out of it when all are
    whole."""
    options = parse(arguments)
    options.left_out = []
    try:
        splits = open_splits(options)
        check_output(options.output, options.overwrite)
        partial = options.output / PARTIAL  # on the disk of the shards, so that moving them is renaming
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for source in splits:
                write_split(source, partial, options)
            if splits[0].classes:
                (partial / CLASSES).write_text("".join(f"{name}\n" for name in splits[0].classes), encoding="utf-8")
            shards = open_index(partial, sorted(path.name for path in partial.glob("*.tar")), whole=True)
            move(partial, options.output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (UserError, OSError) as error:
        print(f"make_shards.py: {error}", file=sys.stderr)
        return 2
    size = sum(shard.length for shard in shards.values()) / 2**20
    print(
        f"{sum(len(shard.names) for shard in shards.values())} images in {len(shards)} shards, {size:.0f} MiB, in"
        f" {options.output}"
    )
    if options.left_out:
        print(f"{len(options.left_out)} files could not be read and are left out:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in options.left_out[:20]), file=sys.stderr)
        if len(options.left_out) > 20:
            print(f"  ... and {len(options.left_out) - 20} more", file=sys.stderr)
    info = DATASETS[options.name]
    statistics = "".join(f" --data.{key} {' '.join(map(str, getattr(info, key)))}" for key in ("mean", "std"))
    print(
        "vit-suite pretrain --data.name shards --data.root"
        f" {options.output}{statistics if info.mean != DATASETS['shards'].mean else ''}"
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--name", required=True, choices=list(DATASETS), metavar="NAME", help=f"data set: {' '.join(DATASETS)}"
    )
    parser.add_argument("--root", help="its folder, as data.root (default: $VIT_SUITE_DATA)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the shards")
    parser.add_argument("--splits", nargs="+", help="which splits (default: train, and the one to score)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-mb", type=positive, default=256, help="largest size of a shard in MiB (default: 256)")
    size.add_argument("--shard-images", type=positive, help="images in a shard, in place of a size")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, default=0, help="of the order of the images (default: 0)")
    order.add_argument("--keep-order", action="store_true", help="do not shuffle: class after class, as most sets lie")
    parser.add_argument(
        "--channels", type=positive, default=3, help="of images that lie in no file of their own (default: 3)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that the output holds")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def open_splits(options: argparse.Namespace) -> list[ImageSource]:
    """The sources to convert: those of --splits, else train and, where there is another, the one that is scored."""
    cfg = DataConfig(name=options.name, root=options.root, channels=options.channels)
    if options.splits:
        return [open_split(cfg, split) for split in dict.fromkeys(options.splits)]
    train = open_split(cfg, "train")
    try:
        scored = open_split(cfg, None)
    except UserError:  # it has none
        return [train]
    return [train] if scored.split == train.split else [train, scored]


def check_output(output: Path, overwrite: bool) -> None:
    """UserError when the output holds something: shards without `overwrite`, anything else ever."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output '{output}' is a file; expected a folder.")
    entries = sorted(path.name for path in output.iterdir() if path.name != PARTIAL)
    others = [name for name in entries if not (name.endswith(".tar") or name in (INDEX, CLASSES))]
    if others:
        raise UserError(
            f"--output '{output}' holds other things than shards ({', '.join(others[:3])}): name another folder."
        )
    if entries and not overwrite:
        raise UserError(
            f"--output '{output}' holds {len(entries)} files ({entries[0]}, ...): name another folder, or give"
            " --overwrite."
        )


def move(partial: Path, output: Path) -> None:
    """Put what is in `partial` into `output`, in place of the shards there.

    The index goes first: as long as shards that it names are missing, a reader refuses the set.
    """
    os.replace(partial / INDEX, output / INDEX)
    for path in output.iterdir():
        if path.name not in (PARTIAL, INDEX):
            path.unlink()
    for path in sorted(partial.iterdir()):
        os.replace(path, output / path.name)


def write_split(source: ImageSource, folder: Path, options: argparse.Namespace) -> None:
    """Write SPLIT-000000.tar, SPLIT-000001.tar, ... into `folder`."""
    limit = sys.maxsize if options.shard_images else options.shard_mb * 2**20
    generator = torch.Generator().manual_seed(stable_seed("make_shards", source.split, options.seed))
    order = range(len(source)) if options.keep_order else torch.randperm(len(source), generator=generator).tolist()
    progress = tqdm(order, desc=source.split, unit=" images", disable=None)
    samples = readable(source, progress, options.left_out)
    for number, part in enumerate(split_up(samples, limit, options.shard_images or sys.maxsize)):
        write_atomically(folder / f"{source.split}-{number:06d}.tar", lambda path, part=part: write_tar(path, part))


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
    """Samples in parts of at most `limit` bytes as tar (a larger sample is a part of its own) and at most `count` of
    them.

    One sample is in memory at a time: a part has to be read to its end before the next is asked for.
    """
    samples = iter(samples)
    waiting = next(samples, None)

    def part() -> Iterator[list[Member]]:
        nonlocal waiting
        size, taken = tarfile.RECORDSIZE, 0  # the end mark
        while waiting is not None:
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
    key = f"{place:08d}-{re.sub(r'[^A-Za-z0-9_]+', '_', stem)[:60]}"  # no dot: a key ends at the first
    label = source.label(index)
    return [(key + extension.lower(), content)] + ([(f"{key}.cls", str(label).encode())] if label >= 0 else [])


def encoded(source: ImageSource, index: int) -> Member:
    """(file name, bytes) of an image: its own, or PNG or .npy of its pixels. UserError when its file cannot be read (a
    link that leads nowhere, a named pipe)."""
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


if __name__ == "__main__":
    sys.exit(main())
