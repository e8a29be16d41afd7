"""Images per second of one core, making DeiT's view (crop, flip, RandAugment, erasing) and RandAugment alone: timm's
with Pillow image by image, beside ours in batches. One process, one thread, taking turns; the time is the process's own
CPU time.

    python scripts/bench_randaugment.py --sizes 32 224
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, rand_augment_transform

from vit_suite.config import SupervisedViewsConfig
from vit_suite.views.draw import alone
from vit_suite.views.randaugment import randaugment_
from vit_suite.views.resample import resize
from vit_suite.views.supervised import SupervisedViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICY = "rand-m9-mstd0.5-inc1-mmax9"
"""DeiT's; `mmax` keeps the strength below 10, where timm asks for 0 bits and newer Pillows refuse."""


def pictures(count: int, side: int) -> torch.Tensor:
    """Smooth uint8 (count, 3, side, side)."""
    coarse = torch.randint(256, (count, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return resize(coarse, (side, side))


def contenders(side: int, count: int) -> dict[str, Callable[[int], object]]:
    """Name -> one pass over `count` images, given its number."""
    images = pictures(count, side)
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    cfg = SupervisedViewsConfig(global_size=side)
    ours = SupervisedViews(cfg, MEAN, STD)
    options = {
        "auto_augment": POLICY,
        "interpolation": "bicubic",
        "re_prob": 0.25,
        "re_mode": "pixel",
        "mean": MEAN,
        "std": STD,
    }
    view = create_transform(side, is_training=True, **options)
    operations = rand_augment_transform(POLICY, {"translate_const": int(0.45 * side), "img_mean": (124, 116, 104)})
    return {
        "view, ours": lambda number: ours(images, alone(count, step=number)),
        "view, timm": lambda number: [view(image) for image in pillow],
        "RandAugment, ours": lambda number: randaugment_(images / 255, alone(count, step=number), cfg, MEAN),
        "RandAugment, timm": lambda number: [np.asarray(operations(image)) for image in pillow],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides of the images in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for side in arguments.sizes:
        count = 256 if side <= 64 else 32
        passes, spent = contenders(side, count), {}
        for number in range(arguments.rounds + 1):
            for name, run in passes.items():
                started = time.process_time()
                run(number)
                if number:  # the first round warms up
                    spent[name] = spent.get(name, 0.0) + time.process_time() - started
        print(
            f"{side} px:",
            ", ".join(f"{name} {arguments.rounds * count / seconds:,.0f}/s" for name, seconds in spent.items()),
        )


if __name__ == "__main__":
    main()
