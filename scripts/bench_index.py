"""What a set of ImageNet-22k's size costs before its first step: memory, time, and shared memory of the first batches.

    python scripts/bench_index.py                    # 14,197,122 images in 21,841 classes, two workers
    python scripts/bench_index.py --images 1281167 --classes 1000

The names are made up and the files do not exist: "decoding" returns zeros. Everything else is what a training does.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import numpy as np
import torch
from torch import Tensor

from vit_suite.data.loader import FileLoader
from vit_suite.data.order import EpochPlan
from vit_suite.data.source import FileSource

MIB = 2**20
SHM = "/dev/shm"


class Blank(FileSource):
    """Images that nobody has to read."""

    def load(self, index: int) -> Tensor:
        return torch.zeros(3, 32, 32, dtype=torch.uint8)


def rss() -> float:
    """MiB that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / MIB


def shared() -> float:
    """MiB of shared memory in use on this machine."""
    found = os.statvfs(SHM)
    return (found.f_blocks - found.f_bfree) * found.f_frsize / MIB


class Clock:
    """Seconds since it was made: wall time, and CPU time of this process alone, which a busy machine lengthens less."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.wall:.1f} s ({time.process_time() - self.cpu:.1f} s of CPU time)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=14_197_122)
    parser.add_argument("--classes", type=int, default=21_841)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    base = rss()

    clock = Clock()
    labels = np.sort(np.arange(given.images) % given.classes)
    names = [f"n{label:08d}/n{label:08d}_{number % 100_000}.JPEG" for number, label in enumerate(labels)]
    made, listed, clock = str(clock), rss(), Clock()
    source = Blank("imagenet22k", "train", "/data", names, 3, [str(n) for n in range(given.classes)], labels)
    del names
    held = str(clock)
    sizes = source.paths.nbytes / MIB, source.labels.nbytes / MIB if source.labels is not None else 0.0
    print(f"list of names (what a walk of the folders leaves): {made}, {listed - base:.0f} MiB")
    print(f"source: {held}; names {sizes[0]:.0f} MiB, labels {sizes[1]:.0f} MiB, shared by the workers")

    plan = EpochPlan(len(source), given.batch_size)
    clock = Clock()
    order = plan.order(0)
    print(f"order of an epoch: {clock}, {order.nbytes / MIB:.0f} MiB")
    del order

    loader = FileLoader(source, plan, given.workers)
    before, clock = shared(), Clock()
    batches = iter(loader)
    kept = [next(batches)]
    first = str(clock)
    kept += [next(batches) for _ in range(3)]
    pixels = sum(images.nbytes for images, _, _ in kept) / MIB
    print(
        f"first batch: {first}; four batches of {given.batch_size} and those that {given.workers} workers have"
        f" ready: {shared() - before:.0f} MiB of {SHM} ({pixels:.0f} MiB are the pixels of the four)"
    )
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    loader.close()


if __name__ == "__main__":
    main()
