"""Images per second of one core, making multi-crop views: image by image with torchvision on PIL images, as DINO's
released code does, beside ours in batches and ours image by image (what a decoding worker runs). One process, one
thread, taking turns, so that the ratios hold on a busy machine too; the time is the process's own CPU time.

    python scripts/bench_views.py --output views.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from PIL import __version__ as pillow_version
from torchvision import transforms

from vit_suite.config import ViewsConfig
from vit_suite.views.draw import alone
from vit_suite.views.multicrop import MultiCrop

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CASES = {
    "small": ("32x32 images in memory, 2 x 32 + 8 x 16", (32, 32), 256, ViewsConfig(global_size=32, local_size=16)),
    "photos": ("500x375 photographs, 2 x 224 + 8 x 96", (375, 500), 8, ViewsConfig(global_size=224, local_size=96)),
}


def official(cfg: ViewsConfig) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The augmentation of DINO's main_dino.py, with cfg's sizes: one function of a PIL image."""
    cubic = transforms.InterpolationMode.BICUBIC
    color = [
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
    ]
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]

    def blur(probability: float) -> Callable[[Image.Image], Image.Image]:
        def run(image: Image.Image) -> Image.Image:
            if np.random.rand() > probability:
                return image
            return image.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))

        return run

    def solarize(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if np.random.rand() < 0.2 else image

    def compose(size: int, scale: list[float], probability: float, *more: Callable) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=cubic)
        return transforms.Compose([crop, *color, blur(probability), *more, *last])

    first = compose(cfg.global_size, cfg.global_scale, 1.0)
    second = compose(cfg.global_size, cfg.global_scale, 0.1, solarize)
    local = compose(cfg.local_size, cfg.local_scale, 0.5)
    return lambda image: [first(image), second(image)] + [local(image) for _ in range(cfg.local_crops)]


def pictures(size: tuple[int, int], count: int) -> torch.Tensor:
    """uint8 (count, 3, H, W) with structure at every scale, as photographs have; from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, *size)
    side = 2
    while side < max(size):
        noise = torch.randn(count, 3, side, side, generator=generator)
        total += torch.nn.functional.interpolate(noise, size=size, mode="bilinear") / side**0.5
        side *= 2
    return total.mul_(50).add_(127).clamp_(0, 255).to(torch.uint8)


def ways(size: tuple[int, int], batch: int, cfg: ViewsConfig) -> dict[str, tuple[int, Callable[[], object]]]:
    """Each way's name, the images a call makes views of, and the call."""
    images = pictures(size, batch)
    ragged = list(images.unbind(0))
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    peer, batched = official(cfg), MultiCrop(cfg, MEAN, STD)
    few = min(batch, 32)
    steps = iter(range(10**9))
    return {
        "PIL, image by image": (few, lambda: [peer(image) for image in pil[:few]]),
        "ours, batched": (batch, lambda: batched(images, alone(batch, 0, 0, next(steps)))),
        "ours, batched, ragged list": (batch, lambda: batched(ragged, alone(batch, 0, 0, next(steps)))),
        "ours, batches of one": (
            few,
            lambda: [batched(image[None], alone(1, 0, 0, next(steps))) for image in ragged[:few]],
        ),
    }


def measure(name: str, rounds: int) -> dict:
    """Images per second of each way: the best of `rounds` alternating runs."""
    title, size, batch, cfg = CASES[name]
    best: dict[str, float] = {}
    calls = ways(size, batch, cfg)
    for _ in range(rounds + 1):  # the first round warms up, and counts too: the best is kept
        for way, (count, call) in calls.items():
            start = time.process_time()
            call()
            best[way] = max(best.get(way, 0.0), count / (time.process_time() - start))
    base = best["PIL, image by image"]
    print(f"{title}")
    for way, speed in best.items():
        print(f"  {way:28s} {speed:9.1f} images/s  {speed / base:6.2f}x")
    ratios = {way: speed / base for way, speed in best.items()}
    return {"case": name, "title": title, "images_per_second": best, "ratio_to_pil": ratios}


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="which case (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each way, the best counts (default: 5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.manual_seed(0)
    cases = [measure(name, options.rounds) for name in (CASES if options.case == "all" else [options.case])]
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": pillow_version}
    if options.output:
        options.output.write_text(json.dumps({"threads": 1, "versions": versions, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
