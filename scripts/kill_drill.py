"""SIGKILL at random moments: does the same command, started again, end with the same weights?

    python scripts/kill_drill.py                       # 20 kills of tiny runs on generated images: minutes on two cores
    python scripts/kill_drill.py --kills 100 --seed 1 --output kills.json

Every kill has a run of its own, with a checkpoint after each step. Every other one waits, from its random moment on,
until a checkpoint is being written. The run then starts again with the same command, undisturbed, and what it ends with
is compared to the bit with the run
that was never killed: the exported backbone, and every tensor of last.ckpt (weights, EMA, center, optimizer). Processes
are forked
from this one, so that they need not import torch 40 times; everything else is `vit-suite pretrain`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # more threads add sums in another order; read when torch is loaded

import pytorch_lightning  # noqa: E402, F401
import torch  # noqa: E402

import vit_suite.commands.pretrain  # noqa: E402, F401 (loaded once, before the processes part)
from vit_suite import cli  # noqa: E402
from vit_suite.reports.results import table  # noqa: E402
from vit_suite.weights.checkpoint import load_backbone, weights_sha256  # noqa: E402

TINY = """
--backbone.patch_size 8 --backbone.dim 24 --backbone.depth 2 --backbone.heads 3
--data.name shapes --data.image_size 32 --data.length 64
--data.test_length 40 --data.batch_size 16 --views.global_size 32 --optim.lr 5e-3
--optim.warmup_epochs 1 --trainer.max_epochs 8
--trainer.log_every 1 --trainer.progress false --trainer.accelerator cpu --trainer.precision fp32 --trainer.threads 1
--evaluate.every_epochs 2 --saving.every_steps 1
""".split()
METHODS = {
    "dino": (
        "--method.out_dim 64 --method.hidden_dim 32 --method.bottleneck_dim 16"
        " --method.warmup_teacher_temperature_epochs 1 --views.local_size 16 --views.local_crops 2"
    ),
    "sit": "--method.name sit --method.contrastive_dim 16 --method.sheet_every_epochs 0",
    "supervised": "--method.name supervised --method.ema 0.9",
}
ORDER = ("dino", "sit", "dino", "supervised")
"""Methods of the kills, in turn."""

fork = multiprocessing.get_context("fork")


def start(folder: Path, method: str) -> multiprocessing.Process:
    """The command in a process of its own."""
    words = ["pretrain", *TINY, *METHODS[method].split(), "--run.output", str(folder)]

    def body() -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(cli.main(words))

    process = fork.Process(target=body)
    process.start()
    return process


def finish(folder: Path, method: str) -> float:
    """Run the command to its end; seconds it took."""
    began = time.perf_counter()
    process = start(folder, method)
    process.join()
    if process.exitcode:
        sys.exit(f"{method} in {folder} ended with status {process.exitcode}")
    return time.perf_counter() - began


def tensors(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, branch in items for name, tensor in tensors(branch, f"{path}.{key}").items()}


def digests(folder: Path) -> tuple[str, str]:
    """sha256 of the exported backbone, and of all tensors of last.ckpt."""
    last = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    return load_backbone(folder).sha256, weights_sha256(tensors(last))


def partial(folder: Path) -> bool:
    """Whether a checkpoint is half written."""
    with contextlib.suppress(FileNotFoundError):
        return any(entry.name.endswith(".partial") for entry in os.scandir(folder / "checkpoints"))
    return False


def kill(folder: Path, method: str, moment: float, while_writing: bool) -> dict[str, Any] | None:
    """Start a run and kill it `moment` seconds later, or when it next writes a checkpoint; what it left. None when it
    had ended."""
    process = start(folder, method)
    end = time.monotonic() + moment
    while process.is_alive() and (time.monotonic() < end or while_writing and not partial(folder)):
        if time.monotonic() < end:
            time.sleep(0.001)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    last = folder / "checkpoints" / "last.ckpt"
    steps = torch.load(last, map_location="cpu", weights_only=True)["global_step"] if last.is_file() else 0
    return {"seconds": round(moment, 3), "steps_saved": int(steps), "half_written": partial(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON with every kill")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    rows, began = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill-drill-") as scratch:
        whole, lengths = {}, {}
        for method in METHODS:
            folder = Path(scratch) / method
            lengths[method] = finish(folder, method)
            whole[method] = digests(folder)
        while len(rows) < options.kills:
            number, method = len(rows), ORDER[len(rows) % len(ORDER)]
            folder = Path(scratch) / f"{number}-{time.monotonic_ns()}"
            found = kill(folder, method, moments.uniform(0, lengths[method]), while_writing=number % 2 == 1)
            if found is None:
                continue
            finish(folder, method)
            same = [ours == theirs for ours, theirs in zip(digests(folder), whole[method], strict=True)]
            rows.append({"kill": number + 1, "method": method, **found, "backbone": same[0], "checkpoint": same[1]})
            print(f"{number + 1}/{options.kills}: {rows[-1]}", file=sys.stderr, flush=True)
    print(
        table(list(rows[0]), [[("no", "yes")[v] if isinstance(v, bool) else v for v in row.values()] for row in rows])
    )
    identical = sum(row["backbone"] and row["checkpoint"] for row in rows)
    print(
        f"\n{identical} of {len(rows)} bit-identical; {time.perf_counter() - began:.0f} s; torch {torch.__version__},"
        " fp32, one thread"
    )
    if options.output:
        result = {
            "identical": identical,
            "kills": rows,
            "sha256": whole,
            "torch": torch.__version__,
            "seed": options.seed,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(identical != len(rows))


if __name__ == "__main__":
    main()
