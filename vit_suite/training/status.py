"""status.json in the run directory: the state of a training, for `vit-suite launch --status` and for people. This file
imports no torch, so that a command that asks for the state is quick."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from vit_suite.files import write_atomically

FILE = "status.json"


@dataclass
class Status:
    """The state of a run. A killed process cannot change it: the run then stays `running`, and `updated` gets old."""

    state: Literal["running", "stopped", "done", "failed"]
    """stopped = by a signal, with a checkpoint; the same command goes on."""
    step: int
    """Optimizer steps done."""
    max_steps: int
    epoch: int
    """Epochs done."""
    images_per_second: float | None = None
    """Of all ranks, over the last seconds of training. Scores do not count."""
    knn: float | None = None
    """Last online kNN top-1 in percent."""
    seconds_left: float | None = None
    """Until max_steps at that speed, without scores."""
    waiting: float | None = None
    """Share of the last seconds, 0 to 1, in which the training loop waited for images."""
    reason: str | None = None
    """The signal, or the error."""
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    """SLURM's number of the job; None without SLURM."""
    updated: float = field(default_factory=time.time)
    """Unix time of this writing."""


def progress_text(status: Status) -> str:
    """The progress of a run: `step 120 of 9750, 812 images/s, kNN 45.10%, 3% waiting for images, 12 min left`."""
    parts = [f"step {status.step} of {status.max_steps}"]
    if status.images_per_second:
        parts.append(f"{status.images_per_second:.0f} images/s")
    if status.knn is not None:
        parts.append(f"kNN {status.knn:.2f}%")
    if status.waiting is not None and status.waiting >= 0.01:
        parts.append(f"{status.waiting:.0%} waiting for images")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3 h 05 min`"""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(0, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def write_status(folder: str | Path, status: Status) -> None:
    """Replace FOLDER/status.json in one step. It is not synced to the disk, because after a power cut an old one is
    enough."""
    text = json.dumps(asdict(status), indent=2) + "\n"
    write_atomically(Path(folder) / FILE, lambda path: path.write_text(text), sync=False)


def read_status(folder: str | Path) -> Status | None:
    """The content of FOLDER/status.json; None if there is none, or it cannot be read."""
    try:
        content = json.loads((Path(folder) / FILE).read_text())
        return Status(**{key: content[key] for key in (each.name for each in fields(Status))})
    except (OSError, ValueError, KeyError, TypeError):
        return None
