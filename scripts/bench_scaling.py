"""How time grows with the size of the work: a DINO step with crops, batch, tokens and prototypes, kNN with its bank.

    python scripts/bench_scaling.py [--axis crops batch tokens prototypes bank] [--plot FILE.png] [--output FILE.json]

CPU time, the least of the rounds, which other jobs disturb least. `exponent` is the slope of a line through the points
on logarithmic axes, `at the end` that between the last two: 1 is linear, less means that a part of the work does not
grow. Only attention grows with the square of the tokens, so `tokens` may lie between 1 and 2; everything else must not
exceed 1 by more than the noise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import in_turn, publish
from bench_knn import TEMPERATURE, features
from bench_step import CASES, CPU, ours
from PIL import Image, ImageDraw

from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.hardware import cores, pick_precision

BASE = CASES["tiny"] | {"batch": 16, "local": 2}
AXES = {
    "crops": (1.0, [4, 10, 34, 66], lambda n: BASE | {"local": n - 2}),
    "batch": (1.0, [8, 32, 128, 256], lambda n: BASE | {"batch": n}),
    "tokens": (2.0, [64, 256, 1024, 2304], lambda n: BASE | {"sizes": (4 * math.isqrt(n), 16), "local": 0, "batch": 4}),
    "prototypes": (1.0, [4096, 32768, 262144], lambda n: BASE | {"prototypes": n}),
    "bank": (1.0, [5_000, 20_000, 80_000], None),
}
"""Name -> the largest exponent that the work itself has, sizes, and the case of scripts/bench_step.py (None: kNN of 500
queries)."""
SIDE, EDGE = 240, 40  # pixels of a panel of the plot


def call_of(axis: str, size: int) -> Callable[[], object]:
    """The work of that size."""
    if case := AXES[axis][2]:
        return ours(case(size), pick_precision("auto", CPU))
    bank, labels = features(size, 384, 1)
    queries, truth = features(500, 384, 2)
    return lambda: knn_classify(bank, labels, queries, truth, options=KNNOptions(ks=[20], temperature=TEMPERATURE))


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of the least-squares line through (log size, log seconds)."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def measure(axis: str, rounds: int) -> dict:
    """The exponents of an axis, and milliseconds by size."""
    most, sizes, _ = AXES[axis]
    times = in_turn({str(size): call_of(axis, size) for size in sizes}, rounds)
    seconds = [min(times[str(size)].cpu) for size in sizes]
    points = {str(size): round(1e3 * value, 2) for size, value in zip(sizes, seconds, strict=True)}
    exponents = {"exponent": slope(sizes, seconds), "at the end": slope(sizes[-2:], seconds[-2:]), "of the work": most}
    return {"axis": axis} | exponents | {"CPU ms": points}


def plot(rows: list[dict], path: Path) -> None:
    """A panel an axis, both of its axes logarithmic: the points, and a line of the largest exponent through the
    last."""
    image = Image.new("RGB", (SIDE * len(rows), SIDE), "white")
    draw = ImageDraw.Draw(image)
    for column, row in enumerate(rows):
        points = [(math.log(float(size)), math.log(value)) for size, value in row["CPU ms"].items()]
        (left, low), (right, high) = (tuple(map(pick, zip(*points, strict=True))) for pick in (min, max))
        scale = (SIDE - 2 * EDGE) / max(
            right - left, high - low
        )  # the same for both, so that a slope of 1 is a diagonal

        def place(x: float, y: float, column=column, left=left, low=low, scale=scale) -> tuple[float, float]:
            return column * SIDE + EDGE + (x - left) * scale, SIDE - EDGE - (y - low) * scale

        x, y = points[-1]
        reach = min(right - left, (high - low) / row["of the work"])
        draw.line([place(x - reach, y - reach * row["of the work"]), place(x, y)], fill="silver", width=2)
        draw.line([place(*point) for point in points], fill="navy", width=2)
        for point in points:
            across, down = place(*point)
            draw.ellipse([across - 3, down - 3, across + 3, down + 3], fill="navy")
        sizes = list(row["CPU ms"])
        draw.text(
            (column * SIDE + EDGE, 8), f"{row['axis']}: exponent {row['at the end']:.2f} at the end", fill="black"
        )
        draw.text((column * SIDE + EDGE, SIDE - EDGE + 12), f"{sizes[0]} to {sizes[-1]}", fill="black")
    image.save(path)


def main() -> None:
    """Parses the options, measures, prints, and writes JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--axis", nargs="+", choices=list(AXES), default=list(AXES), help="what grows (default: everything in turn)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each size (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads (default: the cores)")
    parser.add_argument("--plot", type=Path, help="write a plot to this PNG")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(axis, options.rounds) for axis in options.axis]
    if options.plot:
        plot(rows, options.plot)
    publish(rows, options.output)


if __name__ == "__main__":
    main()
