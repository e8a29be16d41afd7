"""status.json in the run directory: how far a training is, for `vit-suite launch --status` and for people. Without
torch, so that asking is quick."""

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
    """The state of a run. A process that was killed could not say so: its run is `running`, and `updated` stands
    still."""

    state: Literal["running", "stopped", "done", "failed"]
    """stopped: by a signal, with a checkpoint; the same command goes on."""
    step: int
    """Optimizer steps done."""
    max_steps: int
    epoch: int
    """Epochs done."""
    images_per_second: float | None = None
    """Of all ranks, over the last seconds of training, scoring left out."""
    knn: float | None = None
    """Last online kNN top-1 in percent."""
    seconds_left: float | None = None
    """Until max_steps at that speed, scoring left out."""
    reason: str | None = None
    """The signal, or the error."""
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    """SLURM's number of the job; None without SLURM."""
    updated: float = field(default_factory=time.time)
    """Unix time of this writing."""


def write_status(folder: str | Path, status: Status) -> None:
    """Replace FOLDER/status.json in one step. Not synced to the disk: after a power cut an old one will do."""
    text = json.dumps(asdict(status), indent=2) + "\n"
    write_atomically(Path(folder) / FILE, lambda path: path.write_text(text), sync=False)


def read_status(folder: str | Path) -> Status | None:
    """What FOLDER/status.json says; None when there is none, or none that can be read."""
    try:
        content = json.loads((Path(folder) / FILE).read_text())
        return Status(**{key: content[key] for key in (each.name for each in fields(Status))})
    except (OSError, ValueError, KeyError, TypeError):
        return None
