"""How long the command line takes to start, against what any program of this kind has to import.

    python scripts/bench_start.py [--rounds N] [--output FILE.json]

`vit-suite --help` beside `import yaml`, and `pretrain` up to its first training step (of a small network on a few
generated images) beside importing torch, timm and Lightning. The two of a pair take turns. CPU time of the processes,
which other jobs on the machine disturb least, and wall time; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vit_suite.reports.results import table

SCRIPT = Path(sys.executable).with_name("vit-suite")
TRAINING = """
pretrain --data.name shapes --data.image_size 32 --data.length 64 --data.test_length 40 --data.batch_size 16
--backbone.patch_size 8 --backbone.dim 24 --backbone.depth 2 --backbone.heads 3
--method.out_dim 64 --method.hidden_dim 32
--views.global_size 32 --views.local_size 16 --views.local_crops 2 --trainer.accelerator cpu --trainer.progress false
"""
FIRST_STEP = """
import os, sys
from vit_suite import cli
from vit_suite.methods.base import Method
Method.training_step = lambda *_: os._exit(0)
cli.main(sys.argv[1:])
"""
PAIRS = {
    "vit-suite --help": (2.0, [sys.executable, str(SCRIPT), "--help"], [sys.executable, "-c", "import yaml"]),
    "pretrain, first step": (
        1.3,
        [sys.executable, "-c", FIRST_STEP, *TRAINING.split()],
        [sys.executable, "-c", "import torch, timm, pytorch_lightning"],
    ),
}
"""Name -> what the ratio should stay under, our command, what it is held against."""


def cost(command: list[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process that must end well."""
    with tempfile.TemporaryDirectory() as folder:  # where a run would leave its directory
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        return used.ru_utime + used.ru_stime, time.perf_counter() - started


def measure(name: str, rounds: int) -> dict:
    """A pair in turn, after a round that fills the disk cache."""
    target, ours, theirs = PAIRS[name]
    found = [(cost(ours), cost(theirs)) for _ in range(rounds + 1)][1:]
    cpu, wall = ([[round_[who][clock] for round_ in found] for who in (0, 1)] for clock in (0, 1))
    mine, other = map(statistics.median, cpu)
    return {
        "start": name,
        "CPU ms": 1e3 * mine,
        "spread": (max(cpu[0]) - min(cpu[0])) / mine,
        "against, CPU ms": 1e3 * other,
        "ratio": mine / other,
        "target": target,
        "wall ratio": statistics.median(wall[0]) / statistics.median(wall[1]),
    }


def main() -> None:
    """Parses the options, measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", choices=list(PAIRS), default=list(PAIRS), help="which pairs (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts of each of a pair (default: 5)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    rows = [measure(name, options.rounds) for name in options.case]
    print(
        table(
            list(rows[0]),
            [[f"{value:.0%}" if key == "spread" else value for key, value in row.items()] for row in rows],
        )
    )
    if options.output:
        options.output.write_text(json.dumps({"python": sys.version.split()[0], "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
