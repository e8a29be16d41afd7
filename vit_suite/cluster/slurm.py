"""The commands of SLURM that the launcher uses: sbatch and squeue."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from vit_suite.errors import UserError

COLUMNS = {"JobArrayID": 32, "State": 24, "RestartCnt": 12, "TimeLeft": 24, "StartTime": 24, "Reason": 80}
"""Fields of squeue and their widths in characters. (Many clusters' squeue cannot separate fields by a character.)"""
OVER = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)
"""Final states of a job."""


class Entry(NamedTuple):
    """A job, or a run of a job array, as squeue lists it."""

    job: str  # 17, or 17_2 in an array
    state: str
    restarts: int
    time_left: str
    start: str  # N/A where SLURM has no plan yet
    reason: str

    @property
    def over(self) -> bool:
        return self.state in OVER


def require_slurm() -> None:
    """UserError where there is no SLURM."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no SLURM here (no sbatch on PATH): --dry-run prints the script instead of submitting it."
        )


def submit(script: Path) -> str:
    """Submit the script; the id of its job. UserError with sbatch's own words if it refuses."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refuses {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


def queue(job: str) -> list[Entry] | None:
    """The job, or every run of its array. SLURM remembers them for some minutes after the end. None if SLURM does not
    answer."""
    if shutil.which("squeue") is None:
        return None
    fields = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
    done = subprocess.run(
        ["squeue", "-h", "--array", "-t", "all", "-j", job, "-O", fields], capture_output=True, text=True
    )
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None
    return [_entry(line) for line in done.stdout.splitlines() if line.strip()]


def _entry(line: str) -> Entry:
    values, start = [], 0
    for width in COLUMNS.values():
        values.append(line[start : start + width].strip())
        start += width
    job, state, restarts, time_left, begin, reason = values
    return Entry(job, state, int(restarts or 0), time_left, begin, reason)
