"""The state of a job: what SLURM says of it, and what its training last wrote into status.json."""

from __future__ import annotations

import json
import time
from pathlib import Path

from vit_suite.cluster.script import RECORD
from vit_suite.cluster.slurm import Entry, queue
from vit_suite.errors import UserError
from vit_suite.training.status import Status, duration, progress_text, read_status


def report(folder: Path) -> str:
    """A line on the job in `folder`, or on each run of its array. UserError if nothing was launched there."""
    record = read_record(folder)
    names = record.get("runs") or [""]
    if not record and read_status(folder) is None:
        raise UserError(f"'{folder}' holds neither a launched job ({RECORD}) nor the status.json of a run.")
    job = record.get("job")
    entries = queue(job) if job else None
    jobs = [f"{job}_{index}" for index in range(len(names))] if record.get("runs") else [job or ""]
    found = {entry.job: entry for entry in entries or []}
    lines = []
    once = "command" in record  # a job without a run: only SLURM knows how it is
    for name, number in zip(names, jobs, strict=True):
        entry = found.get(number)
        text = describe_once(entry) if once else describe(read_status(folder / name), entry, asked=entries is not None)
        lines.append(f"{folder / name}: {text}" + (f" (job {number})" if job else ""))
    return "\n".join(lines)


def read_record(folder: Path) -> dict:
    """launch.json of a folder: `job`; for an array the names of its `runs`; for a command that is no training its
    `command`. Empty if nothing was launched."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def describe(status: Status | None, entry: Entry | None, asked: bool) -> str:
    """The state of one run in words.

    Args:
        status: status.json of the run.
        entry: SLURM's entry for its job; None if SLURM does not know the job, or was not asked.
        asked: whether SLURM answered.
    """
    if entry is None:
        return _without_slurm(status, asked)
    if entry.state == "PENDING":
        start = "" if entry.start == "N/A" else f", from {entry.start.replace('T', ' ')}"
        if entry.restarts:
            return f"pre-empted, waits to go on ({entry.reason}{start}){_at(status)}"
        return f"queued ({entry.reason}{start})"
    if entry.state == "COMPLETED":
        return (
            "done" + _at(status)
            if status is None or status.state == "done"
            else f"ended, but its status is {status.state}{_at(status)}"
        )
    if entry.state == "PREEMPTED":
        return f"pre-empted, will not start again{_at(status)}"
    if entry.over:
        own = status.reason if status and status.state == "failed" else None
        return f"failed ({own or entry.state.lower().replace('_', ' ')}){_at(status)}"
    if entry.state != "RUNNING":
        return entry.state.lower().replace("_", " ") + _at(status)
    limit = (
        ""
        if entry.time_left in ("UNLIMITED", "NOT_SET", "INVALID")
        else f"; {entry.time_left} until the job's time is up"
    )
    return (f"running: {progress_text(status)}" if status else "running, no step yet") + limit


def describe_once(entry: Entry | None) -> str:
    """The state of a job that runs once and writes no status.json."""
    if entry is None:
        return "SLURM no longer knows the job; its log says how it ended"
    if entry.state in ("PENDING", "PREEMPTED"):
        return describe(None, entry, asked=True)
    words = entry.state.lower().replace("_", " ")
    return {"COMPLETED": "done", "RUNNING": "running"}.get(entry.state, f"failed ({words})" if entry.over else words)


def _without_slurm(status: Status | None, asked: bool) -> str:
    """The state as far as status.json tells it."""
    if status is None:
        return "ended before its first step" if asked else "no step yet"
    if status.state != "running":
        words = {
            "done": "done",
            "stopped": "stopped, goes on when it is started again",
            "failed": f"failed ({status.reason})",
        }
        return words[status.state] + _at(status)
    ago = duration(time.time() - status.updated)
    if asked:
        return f"failed: ended without a word, last heard of {ago} ago{_at(status)}"
    return f"running: {progress_text(status)}; last heard of {ago} ago"


def _at(status: Status | None) -> str:
    """`, step 37 of 100, kNN 41.20%`"""
    if status is None:
        return ""
    knn = "" if status.knn is None else f", kNN {status.knn:.2f}%"
    return f", step {status.step} of {status.max_steps}{knn}"
