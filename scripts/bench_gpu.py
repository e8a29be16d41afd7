"""Training on a GPU: images a second, memory, what Python takes of a step, and the share of what the GPU multiplies at
best, beside the official DINO code and lightly.

    python scripts/bench_gpu.py --peer DINO_CHECKOUT --output benchmarks/gpu.json     once, on a GPU
    python scripts/bench_gpu.py --plan                                                what it would run, and how long
    python scripts/bench_gpu.py --device cpu --tiny                                   on a CPU, to see that it works

Cases `step ...` are steps on ready views (bench_step.py): DINO and DINOv2 with 2 x 224 and 8 x 96 pixels and 65,536
prototypes, MAE with 224 pixels, each at several numbers of images a rank. Beside ours on DINO:

- official fp16, bf16: `--peer`, a checkout of facebookresearch/dino, as its own training runs (loss scaling, the loss
  read in every step), and with bf16 in place of fp16. Without --peer they are left out.
- lightly bf16: its DINO loss and head on a timm ViT, one crop after the other as in its example (pip install
  'vit-suite[bench]').

Cases `training ...` are trainings as `vit-suite pretrain` runs them, Lightning's loop and logging included, from
generated images that lie on the GPU as 8 bits and are augmented there. `compiled` and `graphs` are ours with
trainer.compile blocks and graphs.

Each contender has a process of its own: if one fails, it is reported, and the others go on. After `--minutes` no
further one is started. Speed is the median of the rounds, spread (largest - smallest) / median. `host ms` is how long
Python takes to launch a step on an idle GPU; if it is near `step ms`, the GPU waits for Python. `launches` are kernels
a step. FLOP are those of a contender's own matrix products. Ratios are to the last row of a case and batch that ran,
which `ratio to` names. Aims on an H100: steps 2.5 times as fast as the official code and at 45% of the matmul rate,
DINO S/16 2,000 images/s, `training cifar` 8,000 images/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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
from vit_suite.reports.results import table
from vit_suite.training.parts import build_parts
from vit_suite.training.phases import Phases, now
from vit_suite.training.profile import Recorder, peak_memory
from vit_suite.training.trainer import build_trainer


def whole(case: dict) -> dict:
    """A case without local crops."""
    return {key: value for key, value in case.items() if key != "local"}


VITS16 = CASES["vits16"]
STEPS: dict[str, dict] = {
    "step vits16": VITS16 | {"batches": [16, 64, 128, 256]},
    "step vitb16": VITS16 | {"dim": 768, "heads": 12, "batches": [64]},
    "step dinov2 vits16": VITS16 | {"method": "dinov2", "batches": [64]},
    "step mae vits16": whole(VITS16) | {"method": "mae", "sizes": (224,), "batches": [256]},
}
START, COMPILES, SETTLES = 20, 60, 3
"""Seconds by which --plan counts: a process with torch and CUDA, a compilation, a batch size's first window. Estimated,
not measured."""
EXPECTED = 1500
"""Images a second by which --plan counts."""
IDLE = 5
"""Steps from an idle GPU whose launching is timed."""
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


def measure_step(name: str, case: dict, device: torch.device, options: argparse.Namespace) -> list[dict]:
    """The figures of one contender of a `step` case at each batch size that fits the memory."""
    rows = []
    for batch in case["batches"]:
        try:
            rows.append({"batch": batch} | measure_batch(name, case | {"batch": batch}, device, options))
        except torch.OutOfMemoryError:
            break
    if not rows:
        raise RuntimeError("out of memory at the smallest batch")
    return rows


def measure_batch(name: str, case: dict, device: torch.device, options: argparse.Namespace) -> dict:
    """The figures at one batch size."""
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
    found = figures(times.wall, case["batch"] * options.steps, flops / case["batch"], peak_memory(device))
    milliseconds = 1e3 * statistics.median(times.wall) / options.steps
    return found | {"step ms": milliseconds, "host ms": host_time(step, device), "launches": launches(step, device)}


def host_time(step: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds until a step that starts on an idle device is launched: the median of `IDLE`. On a CPU all of it."""
    found = []
    for _ in range(IDLE):
        now(device)
        started = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - started))
    now(device)
    return statistics.median(found)


def launches(step: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels and graphs that a step launches; None on a CPU."""
    if device.type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        now(device)
    return sum(event.count for event in profiler.key_averages() if "Launch" in event.key and event.key.startswith("cu"))


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


def measure_training(name: str, cfg: PretrainConfig, device: torch.device, options: argparse.Namespace) -> list[dict]:
    """The figures of one contender of a `training` case."""
    trainer = replace(cfg.trainer, accelerator="gpu" if device.type == "cuda" else "cpu", compile=COMPILE[name])
    cfg, batch = replace(cfg, trainer=trainer), cfg.data.batch_size
    with tempfile.TemporaryDirectory() as folder:
        parts = build_parts(cfg, Path(folder))
        data, device = parts.data, parts.device
        clock = Clock(device, options.steps, options.rounds)
        data.trainer = build_trainer(cfg, Path(folder), [clock], parts.precision)
        data.trainer.fit(parts.method, data)
    found = figures(clock.windows, batch * options.steps, clock.flops / batch, peak_memory(device))
    milliseconds = 1e3 * statistics.median(clock.windows) / options.steps
    return [{"batch": batch} | found | {"step ms": milliseconds, "host ms": None, "launches": None}]


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
    """Rows of each contender of a case that runs; why the others do not goes into `failed`."""
    function, what = (measure_step, step_case(case, options)) if case in STEPS else (
        measure_training, trainings(options.tiny)[case])  # fmt: skip
    rows: list[dict] = []
    for name in contenders(case, options):
        if time.monotonic() > options.end:
            failed[f"{case}: {name}"] = f"not started within --minutes {options.minutes:g}"
            continue
        print(f"{case}: {name} ...", file=sys.stderr, flush=True)
        try:
            found = apart(options.start, function, name, what, device, options)
        except Exception as error:  # whatever it is: the others are to be measured
            failed[f"{case}: {name}"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"  failed: {failed[f'{case}: {name}']}", file=sys.stderr)
            continue
        for row in found:
            row = {"case": case, "contender": name} | row
            rows.append(row | {"of matmul rate": row["TFLOP/s"] * 1e12 / rate})
            print(f"  {row['batch']}: {row['images/s']:.1f} images/s", file=sys.stderr, flush=True)
    last = {row["batch"]: row for row in rows}  # the last contender at each batch size
    for row in rows:
        base = last[row["batch"]]
        row |= {"ratio": row["images/s"] / base["images/s"], "ratio to": base["contender"]}
    return rows


def step_case(case: str, options: argparse.Namespace) -> dict:
    """The sizes of a `step` case."""
    if not options.tiny:
        return STEPS[case]
    found = TINY | {"batches": [2, 4], "method": STEPS[case].get("method", "dino")}
    return whole(found) | {"sizes": (32,)} if found["method"] == "mae" else found


def contenders(case: str, options: argparse.Namespace) -> list[str]:
    """Who runs in a case: the peers only in DINO steps."""
    peers = PEERS if case in STEPS and "method" not in STEPS[case] else []
    there = [name for name in (*COMPILE, *peers) if not name.startswith("official") or options.peer]
    return [name for name in there if name in options.contender]


def plan(options: argparse.Namespace) -> list[tuple[str, str, float]]:
    """(case, contender, estimated seconds) of all that would run."""
    found = []
    for case in options.case:
        batches = STEPS[case]["batches"] if case in STEPS else [trainings(tiny=False)[case].data.batch_size]
        for name in contenders(case, options):
            each = (COMPILES if name != "ours" and name in COMPILE else 0) / len(batches) + SETTLES
            images = sum(batches) * options.steps * (options.rounds + 2)
            found.append((case, name, START + each * len(batches) + images / EXPECTED))
    return found


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
    cases, names = [*STEPS, *trainings(tiny=False)], [*COMPILE, *PEERS]
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, help="which cases (default: all)")
    parser.add_argument(
        "--contender",
        nargs="+",
        choices=names,
        default=["ours", *PEERS],
        help="which contenders (default: ours and the peers)",
    )
    parser.add_argument("--peer", type=Path, help="checkout of facebookresearch/dino to run beside ours")
    parser.add_argument("--rounds", type=int, default=3, help="timed windows of each contender (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a window (default: 10)")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no contender after so long (default: 8)")
    parser.add_argument("--plan", action="store_true", help="print what would run, with estimated seconds, and end")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="networks and images of no size, to try the script")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    if options.plan:
        rows = plan(options)
        print(table(["case", "contender", "seconds, estimated"], [[*row[:2], round(row[2])] for row in rows]))
        total = sum(row[2] for row in rows) / 60
        print(f"together {total:.1f} minutes, estimated; none starts after --minutes {options.minutes:g}")
        return
    options.end = time.monotonic() + 60 * options.minutes
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
