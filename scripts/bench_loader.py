"""Images per second of decoding and batching: ours from files, from shards and from memory, beside torchvision's
ImageFolder and a DataLoader, with the same number of workers.

    python scripts/bench_loader.py [--images 512] [--size 375 500] [--workers 2] [--root PHOTOS] [--output FILE.json]

JPEGs are made in a temporary folder, or read from --root (a folder a class). Every contender gives batches of uint8
tensors in random order, one epoch a round; workers live on between epochs, and their CPU time counts. The system holds
the files in memory after the
first round: this is about decoding and moving, not about disks. `memory` needs images of one size, and decodes before
it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench_common import add_ratios, in_turn, publish
from bench_views import pictures
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from vit_suite.config import DataConfig, ImagesConfig, MakeShardsConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.data.pack import pack as make_shards

TICKS = os.sysconf("SC_CLK_TCK")


def make_photographs(root: Path, count: int, size: tuple[int, int]) -> None:
    """`count` JPEGs in two classes, as cameras write them: quality 90."""
    drawn = pictures(size, min(count, 32))
    for index in range(count):
        folder = root / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn[index % len(drawn)].permute(1, 2, 0).numpy()).save(
            folder / f"{index:06d}.jpg", quality=90
        )


def torchvision_loader(root: Path, batch: int, workers: int) -> Iterable:
    """ImageFolder and DataLoader; images may differ in size, so a batch is a list."""
    images = ImageFolder(str(root), transform=PILToTensor())
    return DataLoader(
        images,
        batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=list,
        drop_last=True,
        persistent_workers=workers > 0,
    )


def our_loader(name: str, root: Path, batch: int, workers: int, resident: bool = False) -> Iterable:
    """The training loader of a data set by name."""
    return ImageDataModule(
        DataConfig(name=name, root=str(root), batch_size=batch, workers=workers, resident=resident)
    ).train_dataloader()


def pack(root: Path, shards: Path) -> None:
    """The images of `root` as tar files."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_shards(MakeShardsConfig(str(shards), ImagesConfig(name="folder", root=str(root))))


def epoch(loader: Iterable, batch: int, count: int) -> Callable[[], None]:
    """One call goes through the loader once, and checks that all whole batches came."""

    def run() -> None:
        found = sum(batch for _ in loader)
        if found != count // batch * batch:
            raise SystemExit(f"expected {count // batch * batch} images, got {found}")

    return run


def cpu_seconds() -> float:
    """CPU time of this process and its living workers."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS  # user and system time
    return total


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each contender, torchvision last."""
    root, batch, workers = options.root or folder / "photographs", options.batch, options.workers
    if not options.root:
        make_photographs(root, options.images, tuple(options.size))
    count = len(ImageFolder(str(root)))
    pack(root, folder / "shards")
    loaders = {
        "files": our_loader("folder", root, batch, workers),
        "shards": our_loader("shards", folder / "shards", batch, workers),
    }
    if not options.root:
        loaders["memory"] = our_loader("folder", root, batch, 0, resident=True)
    loaders["torchvision"] = torchvision_loader(root, batch, workers)
    times = in_turn(
        {name: epoch(loader, batch, count) for name, loader in loaders.items()}, options.rounds, cpu_seconds
    )
    rows = [{"contender": name} | times[name].row(count // batch * batch, "images") for name in loaders]
    add_ratios(rows, "images")
    return rows


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="JPEGs that are made (default: 512)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[375, 500], metavar=("H", "W"), help="of each (default: 375 500)"
    )
    parser.add_argument("--root", type=Path, help="read the JPEGs of this folder instead")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (default: 64)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes, 0 = this one (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each contender (default: 5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    publish(rows, options.output, workers=options.workers, batch=options.batch)


if __name__ == "__main__":
    main()
