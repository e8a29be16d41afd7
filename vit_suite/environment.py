"""The environment, set right before torch reads it: launchers' variables, and how threads wait for each other.

PyTorch and Lightning turn the variables of torchrun, srun and SLURM into numbers as they are imported. An empty one, or
one that a script filled with something else, would end every command with "invalid literal for int()".
"""

from __future__ import annotations

import os
from pathlib import Path

from vit_suite.errors import UserError, quote

LEAST = {
    "RANK": 0,
    "LOCAL_RANK": 0,
    "GROUP_RANK": 0,
    "NODE_RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 1,
    "SLURM_ARRAY_TASK_ID": 0,
    "SLURM_CPUS_PER_TASK": 1,
    "SLURM_JOB_ID": 0,
    "SLURM_JOB_NUM_NODES": 1,
    "SLURM_LOCALID": 0,
    "SLURM_NNODES": 1,
    "SLURM_NODEID": 0,
    "SLURM_NTASKS": 1,
    "SLURM_NTASKS_PER_NODE": 1,
    "SLURM_PROCID": 0,
    "SLURM_RESTART_COUNT": 0,
    "SLURM_STEP_ID": 0,
    "SLURM_STEP_NUM_NODES": 1,
    "SLURM_STEP_NUM_TASKS": 1,
}
"""Variable -> its least value."""


def check_environment() -> None:
    """Forget variables that are empty; UserError for one that is no number, or below its least value."""
    for name, least in LEAST.items():
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.strip():
            del os.environ[name]
        elif not (text.strip().isascii() and text.strip().isdigit() and least <= int(text[:20]) < 2**63):
            raise UserError(
                f"the environment variable {name} is {quote(text)}, expected a whole number from {least} on:"
                f" unset it (`unset {name}`) or start the command with torchrun or srun, which set it."
            )
    if int(os.environ.get("RANK", "0")) >= int(os.environ.get("WORLD_SIZE", "1")) and "WORLD_SIZE" in os.environ:
        raise UserError(
            f"the environment variable RANK is {os.environ['RANK']}, but WORLD_SIZE is {os.environ['WORLD_SIZE']}:"
            " unset both, or start the command with torchrun, which sets them."
        )


def choose_waiting() -> None:
    """Say how OpenMP threads wait for each other, unless the user did; libgomp reads it once, when torch is imported.

    A waiting thread spins for a while before it sleeps. On free cores that is faster: DINO on CIFAR-10, two cores, made
    518 images/s with libgomp's 300,000 turns, 494 with 100,000 and 334 without. Beside other jobs it takes the time
    that they, and the thread that is waited for, need: a loop of two threads on two cores beside ten other jobs made
    0.15 steps/s with 100,000 turns and 0.48 without. So beside other jobs threads sleep at once, and else they spin a
    third as long as by default.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if others_at_work():
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ["GOMP_SPINCOUNT"] = "100000"


def others_at_work() -> bool:
    """Whether other jobs want half of this process's cores or more: in the last minute, or now.

    Linux counts what is ready to run in the fourth field of /proc/loadavg, this process included.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return False
    try:
        now = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        now = 0
    return max(load, now) >= cores / 2
