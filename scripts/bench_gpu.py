"""Training on a GPU: images a second, memory, and the share of what the GPU multiplies at best, beside the official
DINO code and lightly.

    python scripts/bench_gpu.py --peer DINO_CHECKOUT --output benchmarks/gpu.json     once, on a GPU python
    scripts/bench_gpu.py --device cpu --tiny                                   on a CPU, only to see that it works

Cases `step ...` are DINO steps on ready views of 2 x 224 and 8 x 96 pixels, K 65,536 (bench_step.py), ours beside:

    official fp16, bf16   `--peer`, a checkout of facebookresearch/dino, as its own training runs (loss scaling, the
    loss read in every
                          step), and with bf16 in place of fp16; without --peer they are left out
    lightly bf16          its DINO loss and head on a timm ViT, one crop after the other as in its example (pip install
    'vit-suite[bench]')

Cases `training ...` are trainings as `vit-suite pretrain` runs them, Lightning's loop and logging included, from
generated images that lie on the GPU as 8 bits and are augmented there. `compiled` and `graphs` are ours with
trainer.compile blocks and graphs.

Each contender has a process of its own: one that fails is reported and the others go on. Speed is the median of the
rounds, spread
(largest - smallest) / median; FLOP are those of a contender's own matrix products; ratios are to the last row of a case
that ran, which `ratio to` names. Aims on an H100: steps 2.5 times as fast as the official code and at 45% of the matmul
rate, `training cifar` 8,000 images/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from bench_common import Times, in_turn, publish
from bench_step import CASES, lightly, official, ours, products

from vit_suite.config import (
    BackboneConfig,
    DataConfig,
    DINOConfig,
    EvaluateConfig,
    OptimConfig,
    PretrainConfig,
    SiTConfig,
    SiTOptimConfig,
    SiTViewsConfig,
    SupervisedConfig,
    SupervisedOptimConfig,
    SupervisedViewsConfig,
    TrainerConfig,
    ViewsConfig,
)
from vit_suite.hardware import matmul_rate
from vit_suite.training.parts import build_parts
from vit_suite.training.phases import Phases, now
from vit_suite.training.profile import Recorder, peak_memory
from vit_suite.training.trainer import build_trainer

STEPS = {
    "step vits16": CASES["vits16"] | {"batch": 64},
    "step vitb16": CASES["vits16"] | {"dim": 768, "heads": 12, "batch": 64},
}
TINY = {"dim": 24, "depth": 2, "heads": 3, "patch": 8, "sizes": (32, 16), "local": 2, "batch": 4, "prototypes": 64}
COMPILE = {"ours graphs": "graphs", "ours compiled": "blocks", "ours": "none"}
PEERS = ["lightly bf16", "official bf16", "official fp16"]
PACKAGES = ("vit-suite", "torch", "torchvision", "pytorch-lightning", "timm", "lightly", "triton")


def training(method: Any, crops: Any, optim: Any, backbone: dict, side: int, length: int, batch: int) -> PretrainConfig:
    """A training on `length` generated images of `side` pixels, without scores."""
    return PretrainConfig(
        method=method,
        backbone=BackboneConfig(**backbone),
        views=crops,
        optim=optim,
        data=DataConfig(name="shapes", image_size=side, length=length, test_length=16, batch_size=batch),
        evaluate=EvaluateConfig(every_epochs=0),
        trainer=TrainerConfig(max_epochs=10**4, devices=1, precision="bf16", progress=False),
    )


def trainings(tiny: bool) -> dict[str, PretrainConfig]:
    """The cases that are whole trainings."""
    small = {"patch_size": 4, "dim": 192, "depth": 12, "heads": 3}
    vits16 = {"patch_size": 16, "dim": 384, "depth": 12, "heads": 6}
    cifar, photo, sizes = (32, 50_000, 512), (256, 2048, 64), {}
    if tiny:
        small = vits16 = {"patch_size": 8, "dim": 24, "depth": 2, "heads": 3}
        cifar, photo, sizes = (32, 16, 4), (40, 16, 4), {"global_size": 32}
    dino = DINOConfig(out_dim=4096)
    return {
        "training cifar": training(dino, ViewsConfig(global_size=32, local_size=16), OptimConfig(), small, *cifar),
        "training sit vits16": training(SiTConfig(), SiTViewsConfig(**sizes), SiTOptimConfig(), vits16, *photo),
        "training supervised vits16": training(
            SupervisedConfig(),
            SupervisedViewsConfig(**sizes),
            SupervisedOptimConfig(),
            vits16,
            *photo[:2],
            4 * photo[2],
        ),
    }


def measure_step(name: str, case: dict, device: torch.device, options: argparse.Namespace) -> dict:
    """The figures of one contender of a `step` case."""
    if name in COMPILE:
        step = ours(case, "bf16", device=device, compile=COMPILE[name])
    else:
        who, precision = name.split()
        step = lightly(case, precision, device) if who == "lightly" else official(case, options.peer, precision, device)
    flops = products(step)

    def window() -> None:
        for _ in range(options.steps):
            step()
        now(device)

    window()  # compiles, and has the allocator settle
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = in_turn({name: window}, options.rounds)[name]
    return figures(times.wall, case["batch"] * options.steps, flops / case["batch"], peak_memory(device))


class Clock(Recorder):
    """Times windows of steps of a training, and ends it; the first step's products are counted as `vit-suite profile`
    counts them."""

    def __init__(self, device: torch.device, steps: int, rounds: int) -> None:
        super().__init__(Phases(device), warmup=steps, steps=steps)
        self.rounds = rounds
        self.windows: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        windows, within = divmod(trainer.global_step - self.warmup, self.steps)
        if windows < 0 or within:
            return
        moment, device = now(self.phases.device), self.phases.device
        if windows:
            self.windows.append(moment - self._since)
        elif device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._since = moment
        trainer.should_stop = windows == self.rounds


def measure_training(name: str, cfg: PretrainConfig, device: torch.device, options: argparse.Namespace) -> dict:
    """The figures of one contender of a `training` case."""
    trainer = replace(cfg.trainer, accelerator="gpu" if device.type == "cuda" else "cpu", compile=COMPILE[name])
    cfg, batch = replace(cfg, trainer=trainer), cfg.data.batch_size
    with tempfile.TemporaryDirectory() as folder:
        data, method, device, precision = build_parts(cfg, Path(folder))
        clock = Clock(device, options.steps, options.rounds)
        data.trainer = build_trainer(cfg, Path(folder), [clock], precision)
        data.trainer.fit(method, data)
    return figures(clock.windows, batch * options.steps, clock.flops / batch, peak_memory(device))


def figures(seconds: list[float], images: int, flops: float, peak: int) -> dict:
    """Of windows of `images` images each: speed, spread, work and memory."""
    speed = Times(seconds, seconds).row(images, "images")
    work = {"GFLOP an image": flops / 1e9, "TFLOP/s": speed["images/s"] * flops / 1e12}
    return {"images/s": speed["images/s"], "spread": speed["spread"]} | work | {"peak MiB": peak / 2**20}


def apart(start: str, function: Callable, *args: Any) -> Any:
    """What `function` returns, in a process of its own, which is spawned or forked (`start`)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        return pool.submit(function, *args).result()


def measure(
    case: str, device: torch.device, options: argparse.Namespace, rate: float, failed: dict[str, str]
) -> list[dict]:
    """A row for each contender of a case that runs; why the others do not goes into `failed`."""
    sizes = STEPS if not options.tiny else dict.fromkeys(STEPS, TINY)
    function, what = (measure_step, sizes[case]) if case in STEPS else (measure_training, trainings(options.tiny)[case])
    rows = []
    for name in [*COMPILE, *PEERS] if case in STEPS else COMPILE:
        if name not in options.contender or (name.startswith("official") and not options.peer):
            continue
        print(f"{case}: {name} ...", file=sys.stderr, flush=True)
        try:
            row = {"case": case, "contender": name} | apart(options.start, function, name, what, device, options)
        except Exception as error:  # whatever it is: the others are to be measured
            failed[f"{case}: {name}"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"  failed: {failed[f'{case}: {name}']}", file=sys.stderr)
            continue
        rows.append(row | {"of matmul rate": row["TFLOP/s"] * 1e12 / rate})
        print(f"  {row['images/s']:.1f} images/s", file=sys.stderr, flush=True)
    return [row | {"ratio": row["images/s"] / rows[-1]["images/s"], "ratio to": rows[-1]["contender"]} for row in rows]


def hardware(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    if device.type == "cpu":
        return {}  # `publish` says which
    found = torch.cuda.get_device_properties(device)
    about = {
        "hardware": f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "-i", "0"]
        about["driver and power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return about | {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}


def versions() -> dict[str, str]:
    """Of the packages that matter here and are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases, contenders = [*STEPS, *trainings(tiny=False)], [*COMPILE, *PEERS]
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, help="which cases (default: all)")
    parser.add_argument(
        "--contender", nargs="+", choices=contenders, default=contenders, help="which contenders (default: all)"
    )
    parser.add_argument("--peer", type=Path, help="checkout of facebookresearch/dino to run beside ours")
    parser.add_argument("--rounds", type=int, default=5, help="timed windows of each contender (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a window (default: 20)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="networks and images of no size, to try the script")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    options.start = "spawn" if options.device == "cuda" else "fork"  # quicker, but CUDA does not survive it
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "bench_gpu.py: torch sees no GPU here; --device cpu --tiny shows on a CPU that the script works."
        )
    device, failed = torch.device(options.device), {}
    about = apart(options.start, hardware, device) | {"versions": versions()}
    rate = apart(options.start, matmul_rate, "bf16", device)
    rows = [row for case in options.case for row in measure(case, device, options, rate, failed)]
    if not rows:
        raise SystemExit("bench_gpu.py: no contender ran.")
    sizes = {"rounds": options.rounds, "steps": options.steps, "tiny": options.tiny}
    publish(rows, options.output, matmul_teraflops=round(rate / 1e12, 1), failed=failed, **about, **sizes)


if __name__ == "__main__":
    main()
