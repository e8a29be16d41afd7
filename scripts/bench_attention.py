"""How much of an attention export is the model: overlay and mask of each head and the mean of 1,000 images of 64 x 64,
on this CPU.

    python scripts/bench_attention.py [--images 1000] [--threads N] [--precision fp32] [--output FILE.json]

Prints for each ViT the images a second of the whole export (decode, look, draw, write) and of its forward passes alone
in as many threads, and three shares of the model in an export; 70% and more is the aim:

    time       the forward passes alone, over the whole export
    threads    of the time of the export's threads, what they spent in the forward pass, waiting for each other included
    processor  the same as `time` in processor time, which says the same on a machine that has other work too

The time depends on the disk: an export writes two files for each head and two for the mean of every image.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from vit_suite.attention.export import export_attention
from vit_suite.attention.export_options import ExportOptions
from vit_suite.attention.maps import look
from vit_suite.config import BackboneConfig
from vit_suite.data.shapes import ShapesSource
from vit_suite.hardware import autocast, cores, pick_precision
from vit_suite.models.backbone import Backbone
from vit_suite.reports.results import table

MODELS = {
    "ViT-S/8 (dim 384, depth 12)": {"dim": 384, "depth": 12, "heads": 6, "patch_size": 8},
    "ViT-S/16 (dim 384, depth 12)": {"dim": 384, "depth": 12, "heads": 6, "patch_size": 16},
    "ViT-Ti/8 (dim 192, depth 12)": {"dim": 192, "depth": 12, "heads": 3, "patch_size": 8},
    "configs/dino/cifar10_cpu (dim 128, depth 4, patch 8)": {"dim": 128, "depth": 4, "heads": 4, "patch_size": 8},
}
SIDE, BATCH = 64, 16
MEAN, STD = [0.5] * 3, [0.25] * 3
CPU = torch.device("cpu")


def write_images(folder: Path, count: int) -> None:
    """Generated photographs' stand-ins as JPEG."""
    folder.mkdir()
    source = ShapesSource("test", count, (SIDE, SIDE), 3, 0)
    for index in range(count):
        Image.fromarray(source.load(index).permute(1, 2, 0).numpy()).save(folder / f"{index:05}.jpg", quality=90)


def alone(backbone: Backbone, count: int, threads: int, precision: str) -> tuple[float, float]:
    """Seconds and processor seconds of nothing but the forward passes, batches in threads as in an export."""
    batches = [torch.randn(min(BATCH, count - start), 3, SIDE, SIDE) for start in range(0, count, BATCH)]

    @torch.no_grad()
    def forward(images: torch.Tensor) -> None:
        with autocast(precision, CPU):
            look(backbone, images)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(forward, batches[:threads]))
        started, busy = time.perf_counter(), time.process_time()
        list(pool.map(forward, batches))
        return time.perf_counter() - started, time.process_time() - busy


def measure(name: str, images: Path, output: Path, count: int, threads: int, precision: str) -> dict:
    """One export, and the model alone before and after it: the machine's speed may drift."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(image_size=[SIDE, SIDE], drop_path=0.0, **MODELS[name])).eval()
    before = alone(backbone, count, threads, precision)
    options = ExportOptions(precision=precision, batch_size=BATCH, workers=threads)
    started, busy = time.perf_counter(), time.process_time()
    summary = export_attention(backbone, images, output, MEAN, STD, options)
    seconds, processor = time.perf_counter() - started, time.process_time() - busy
    model_seconds, model_processor = (
        sum(pair) / 2 for pair in zip(before, alone(backbone, count, threads, precision), strict=True)
    )
    return {
        "model": name,
        "files an image": sum(summary.files.values()) // count,
        "images/s": count / seconds,
        "model alone": count / model_seconds,
        "time": model_seconds / seconds,
        "threads": summary.model_share,
        "processor": model_processor / processor,
    }


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images (default: 1000)")
    parser.add_argument("--threads", type=int, default=min(8, cores()), help="threads (default: the cores, at most 8)")
    parser.add_argument(
        "--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of the forward pass (default: auto)"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # an export uses one for each of its own threads
    precision = pick_precision(options.precision, CPU)
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # deleted at the end: on ext4, new files cost 10 times more after many deletions
        images = Path(folder) / "images"
        write_images(images, options.images)
        outputs = [Path(folder) / str(number) for number in range(len(MODELS))]
        rows = [
            measure(name, images, output, options.images, options.threads, precision)
            for name, output in zip(MODELS, outputs, strict=True)
        ]
    about = f"{options.threads} threads, {precision}, torch {torch.__version__}"
    print(f"{options.images} images of {SIDE} x {SIDE}, overlay and mask, {about}")
    shares = ("time", "threads", "processor")
    print(
        table(
            list(rows[0]), [[f"{value:.0%}" if key in shares else value for key, value in row.items()] for row in rows]
        )
    )
    if options.output:
        options.output.write_text(
            json.dumps({"threads": options.threads, "precision": precision, "rows": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
