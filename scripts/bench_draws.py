"""What a rank's random numbers of a DINO step cost: multi-crop of 2 + 8 views, and drop path of 12 blocks.

    python scripts/bench_draws.py [--images 128] [--ranks 1 8 32 376]

One thread; the median of 20 steps, in milliseconds of CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vit_suite.views.draw import Draw
from vit_suite.views.multicrop import DRAWS

VIEWS, PATHS = 10, 24
STEPS = 20


def milliseconds(images: int, ranks: int) -> float:
    """Of the last rank's draws, `images` rows of a global batch of `images * ranks`."""
    rows, seconds = slice(images * (ranks - 1), images * ranks), []
    for step in range(STEPS):
        start = time.process_time()
        draw = Draw(0, 0, step, rows, images * ranks)
        assert len(draw.uniform(VIEWS, DRAWS, purpose="views")) == images
        draw.uniform(VIEWS, PATHS, purpose="drop path")
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128, help="images of a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 32, 376])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in options.ranks:
        print(f"{options.images * ranks:6d} images, {ranks:3d} ranks: {milliseconds(options.images, ranks):7.2f} ms")


if __name__ == "__main__":
    main()
