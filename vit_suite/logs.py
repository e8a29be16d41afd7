"""What the commands say: our messages, and of Lightning's the warnings only."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Sized
from typing import Any

SECONDS_BETWEEN_LINES = 30.0
"""Of progress in a log file. A job that takes less says nothing of its progress."""


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
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")  # its successor syncs at the start
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers"
    )  # images are in memory, or data.workers said so
    warnings.filterwarnings(
        "ignore", message=".*`srun` command is available"
    )  # on a login node every plain run would hear it


class _Lines(io.TextIOBase):
    """Writes what a progress bar draws to stderr, one line a time, without carriage returns."""

    def write(self, text: str) -> int:
        if said := text.strip("\r\n "):
            sys.stderr.write(said + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int | Sized, desc: str | None, unit: str, shown: bool = True, leave: bool = False) -> Any:
    """A tqdm bar on a terminal. In a log file it is a line every `SECONDS_BETWEEN_LINES`.

    Args:
        total: how many of `unit` there are, and `bar.update(n)` counts n of them; or the things themselves, and the
            loop over the bar counts them.
        leave: the bar stays on the terminal when it is full.
    """
    from tqdm import tqdm

    options: dict[str, Any] = {}
    shown = shown and sys.stderr is not None
    if shown and not sys.stderr.isatty():
        often = SECONDS_BETWEEN_LINES
        options = {"file": _Lines(), "mininterval": often, "maxinterval": often, "delay": often, "ncols": 100}
    over: dict[str, Any] = {"total": total} if isinstance(total, int) else {"iterable": total}
    return tqdm(**over, desc=desc, unit=unit, leave=leave, disable=not shown, **options)
