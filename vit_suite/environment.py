"""What torchrun, srun and SLURM say in the environment, checked before anything reads it.

PyTorch and Lightning turn these variables into numbers as they are imported. An empty one, or one that a script filled
with something else, would end every command with "invalid literal for int()".
"""

from __future__ import annotations

import os

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
