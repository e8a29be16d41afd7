"""What the commands say: our messages, and of Lightning's the warnings only."""

from __future__ import annotations

import logging
import os
import warnings


def main_process() -> bool:
    """Whether this process speaks and writes for all; known from what launchers set, before a process group is up.

    torchrun says RANK. Otherwise every number must be 0: in a shell on a SLURM node SLURM_PROCID is 0 for all processes
    that Lightning starts from it, which LOCAL_RANK tells apart.
    """
    names = ["RANK"] if "RANK" in os.environ else ["SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"]
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def speak() -> None:
    """Show the messages of this package on stderr: all of the main process, warnings of the others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vit_suite").setLevel(logging.INFO if main_process() else logging.WARNING)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of a torch name
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers"
    )  # images are in memory, or data.workers said so
    warnings.filterwarnings(
        "ignore", message=".*`srun` command is available"
    )  # on a login node every plain run would hear it
