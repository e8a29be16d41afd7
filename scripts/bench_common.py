"""What the benches share: contenders that take turns, the memory of a process, a table and JSON of the figures."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vit_suite.hardware import cores
from vit_suite.reports.results import table

PERCENT = ("spread", "of matmul rate")


def parse(parser: argparse.ArgumentParser, timed: str) -> argparse.Namespace:
    """The options of `parser`, and those of all benches whose contenders take turns; sets the threads. `timed`: what a
    round times."""
    parser.add_argument("--peer", type=Path, help="checkout of facebookresearch/dino to run beside ours")
    parser.add_argument("--rounds", type=int, default=5, help=f"timed {timed} of each contender (default: 5)")
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads (default: the cores)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the contender whose memory this process measures
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def peak_memory(only: str, *words: str) -> float:
    """MiB that a contender adds to a process of its own: this script again, with these options too, which prints it
    last."""
    done = subprocess.run(
        [sys.executable, *sys.argv, *words, "--only", only], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


class Times(NamedTuple):
    """Seconds of each call."""

    wall: list[float]
    cpu: list[float]

    def row(self, count: int, unit: str) -> dict[str, float]:
        """Median of `count` units a second, (largest - smallest) / median of it, and units a second of CPU time."""
        speeds = [count / seconds for seconds in self.wall]
        speed = statistics.median(speeds)
        spread = (max(speeds) - min(speeds)) / speed
        return {f"{unit}/s": speed, "spread": spread, f"{unit}/CPU-s": count / statistics.median(self.cpu)}


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, cpu: Callable[[], float] = time.process_time
) -> dict[str, Times]:
    """Time the calls one after the other, `rounds` times after a round that warms up, so that ratios hold on a busy
    machine.

    `cpu`: seconds of CPU time spent so far.
    """
    times = {name: Times([], []) for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started, before = time.perf_counter(), cpu()
            call()
            if number:
                times[name].wall.append(time.perf_counter() - started)
                times[name].cpu.append(cpu() - before)
    return times


def add_ratios(rows: Sequence[dict], unit: str) -> None:
    """Write the ratio to the last row into all, of wall time and of CPU time."""
    for row in rows:
        row["ratio"] = row[f"{unit}/s"] / rows[-1][f"{unit}/s"]
        row["CPU ratio"] = row[f"{unit}/CPU-s"] / rows[-1][f"{unit}/CPU-s"]


def added(call: Callable[[], Any]) -> float:
    """MiB that a call adds, at most, to what this process holds and does not only keep for later."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets what it held at most before
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process: VmRSS (now) or VmHWM (most ever)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def cpu() -> str:
    """This machine's CPU: its model, the widest instructions that torch uses, and what multiplies bf16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    units = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512-BF16"}
    native = [name for probe, name in units.items() if getattr(torch.cpu, probe, lambda: False)()]
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, bf16 by {native[0] if native else 'nothing'}"


def publish(rows: Sequence[dict], output: Path | None, **about: Any) -> None:
    """Print the rows, and write them to `output` with what else is worth knowing."""
    about = {"cpu": cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__} | about
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(
        table(
            list(rows[0]), [[f"{value:.0%}" if key in PERCENT else value for key, value in row.items()] for row in rows]
        )
    )
    if output:
        output.write_text(json.dumps(about | {"rows": list(rows)}, indent=2) + "\n")
