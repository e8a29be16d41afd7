"""One rank that fails ends all ranks, and status.json says why it failed.

Without this, the failing rank would raise its error alone. The others stand in a collective, where they wait for it:
gloo tells them that a connection was closed, NCCL lets them wait for half an hour, and NCCL may also keep the failing
process itself from ending. So the failing rank writes its cause first, leaves Lightning's teardown out, and the command
ends with `os._exit` (cli.py). The launcher (torchrun, srun --kill-on-bad-exit, Lightning) then ends the other ranks.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytorch_lightning as pl

from vit_suite import distributed
from vit_suite.errors import UserError
from vit_suite.signals import Stopped
from vit_suite.training import rundir
from vit_suite.training.progress import Progress
from vit_suite.training.status import read_status, write_status

NO_FAILURE = (Stopped, KeyboardInterrupt, SystemExit)
"""Ends of a training that all ranks come to by themselves, or that are the launcher's business."""
SETTLED = 1.0
"""Seconds after which the cause is looked at again: rank 0 may have been about to write that it runs."""
PATIENCE = 5.0
"""Seconds in which a rank that lost its peer waits for the peer's words in status.json, and rank 0 for the end of
processes that it started."""
LONGEST = 300
"""Characters of an error in status.json."""


class PeerFailed(RuntimeError):
    """Another rank failed; the message is its cause."""


def cause_of(error: BaseException, rank: int) -> str:
    """The error as status.json says it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST] + (f" (rank {rank})" if rank else "")


def note_before_start(folder: Path, error: BaseException) -> None:
    """Say in status.json that another rank than the first failed before the ranks met: its node lacks the images, or
    its GPU is broken. The launcher then ends rank 0, which waits for all ranks and cannot know why."""
    rank = max(int(os.environ.get(name, "0")) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    for _ in range(int(PATIENCE / SETTLED)):  # until rank 0 has made the directory, and may have written over this
        status = read_status(folder)
        if status is not None and status.state == "running":
            with suppress(OSError):
                write_status(folder, replace(status, state="failed", reason=cause_of(error, rank), updated=time.time()))
        time.sleep(SETTLED)


class FailTogether(pl.Callback):
    """Writes the cause of a failure into status.json, and sees to it that no rank waits for this one.

    Args:
        progress: writes status.json.
        fresh: the run does not resume. If a user's fault ends it before its first step, nothing of it stays.
    """

    def __init__(self, progress: Progress, fresh: bool):
        self.progress, self.fresh = progress, fresh
        self.noted = False

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if distributed.active() and not isinstance(exception, NO_FAILURE):
            self.end_all(trainer, exception)

    def end_all(self, trainer: Any, error: BaseException) -> None:
        """Note the failure, and prepare this process to end at once. All of this runs on the failing rank alone."""
        if distributed.lost_peer(error):
            self._wait_for(self.cause)  # the peer writes it before its connections close
        self.note(trainer, error)
        distributed.tear()
        trainer._teardown = lambda: None  # it waits for the GPU, and so for the peers of a collective
        for process in getattr(trainer.strategy.launcher, "procs", []):  # ranks that Lightning started from this one
            with suppress(TimeoutExpired):
                process.wait(PATIENCE)
            process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))

    def note(self, trainer: pl.Trainer, error: BaseException) -> None:
        """Say in status.json that the run failed, unless another rank said so before. A user's fault before the first
        step of a fresh run removes the run instead."""
        if self.noted:
            return
        self.noted = True
        folder, rank = self.progress.folder, distributed.rank()
        if isinstance(error, UserError) and self.fresh and trainer.global_step == 0 and rank == 0:
            if self.cause() is None:
                rundir.take_back(folder)
            return
        reason = cause_of(error, rank)
        for _ in range(3):  # rank 0 may write over the first, and hardly over the second
            if self.cause() is not None or not (folder / rundir.CONFIG).is_file():  # which rank 0 may have taken back
                return
            with suppress(OSError):  # on a full disk the error itself is what to tell
                self.progress.write("failed", reason)
            time.sleep(SETTLED if distributed.active() else 0)

    def cause(self) -> str | None:
        """Why the run failed, if a rank has said it."""
        status = read_status(self.progress.folder)
        return status.reason if status is not None and status.state == "failed" else None

    def explained(self, error: BaseException) -> BaseException:
        """`error`, or the cause of the peer's failure where all that this rank saw was the loss of its peer."""
        cause = self.cause() if distributed.lost_peer(error) else None
        return error if cause is None else PeerFailed(f"another rank failed: {cause}")

    @staticmethod
    def _wait_for(found: Any) -> None:
        until = time.monotonic() + PATIENCE
        while found() is None and time.monotonic() < until:
            time.sleep(0.1)
