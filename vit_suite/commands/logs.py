"""What the commands say: our messages, and of Lightning's the warnings only."""

from __future__ import annotations

import logging
import os
import warnings


def main_process() -> bool:
    """Whether this process speaks and writes for all; known from what launchers set, before a process group is up."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))) == 0


def speak() -> None:
    """Show the messages of this package on stderr: all of the main process, warnings of the others."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vit_suite").setLevel(logging.INFO if main_process() else logging.WARNING)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # Lightning's own use of a torch name
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # images are in memory, or data.workers said so
    # The time limit of an interrupted run need not be that of the run that goes on.
    warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint.*\['Timer'\]")
