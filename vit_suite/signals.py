"""Signals that ask a training to stop. A handler only notes them; the training stops after the current step.

SIGUSR1 is a cluster's warning (SLURM: `--signal=USR1@90`), SIGTERM its request to end (`scancel`, `kill`), SIGINT is
Ctrl-C. A handler saves nothing, because it runs between any two bytecodes: half a step may be done, and other ranks are
elsewhere. Windows has no SIGUSR1, so there is no warning there; the rest works.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

WARNING: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""A cluster's warning that a job's time is nearly up; None on Windows."""
TRY_AGAIN = 75
"""Exit status EX_TEMPFAIL of sysexits.h, which `os` does not have on Windows."""
STATUS: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
"""Signal -> exit status of a training that it stopped. Shells use 143 and 130 too; 75 means "try again"."""
if WARNING is not None:
    STATUS[WARNING] = TRY_AGAIN
ECHO = 1.0
"""Seconds within which a repeated signal is the same request, because a launcher and the system may both send it."""
GRACE = 60
"""Seconds between two looks of a loader's worker, after SIGTERM, at whether its main process still lives."""


class Stopped(Exception):
    """A signal ended the training after `step` optimizer steps, and its checkpoint is saved.

    `status` is the exit status of the command.
    """

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.signal, self.step = signal.Signals(number), step
        self.status = STATUS[self.signal]
        self.advice = "the same command goes on"

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} at step {self.step}, checkpoint saved; {self.advice}"


class Signals:
    """Notes signals within its `with` block. `noted` is the number of the first one, or 0.

    SIGUSR1 is noted from the start. SIGTERM and SIGINT are noted only after `listen()`: before the first step there is
    nothing to save, and they end the process as usual. A second SIGTERM or SIGINT ends the process at once; SIGUSR1
    stays a warning, however often it comes.
    """

    def __init__(self) -> None:
        self.noted = 0
        self._came: dict[int, float] = {}  # signal -> when it first came
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in STATUS}
        if WARNING is not None:
            self._note(WARNING)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            self._set(number, handler)

    def listen(self) -> None:
        """Note SIGTERM and SIGINT too from now on. Other handlers of them are not called."""
        self._note(signal.SIGTERM)
        # nohup, and shells that start a background job, make it ignore Ctrl-C; that stays so.
        if self._before[signal.SIGINT] is not signal.SIG_IGN:
            self._note(signal.SIGINT)

    def _note(self, number: int) -> None:
        self._set(number, self._handle)

    @staticmethod
    def _set(number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number != WARNING and now - self._came.get(number, now) > ECHO:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        self._came.setdefault(number, now)
        self.noted = self.noted or number


def outlive(worker: int = 0) -> None:
    """Make this process, a worker of the loader, live as long as its main process.

    Ctrl-C reaches every process of a terminal, and a cluster may signal every process of a job. If a worker died of it,
    the current step, however long it takes, and the checkpoint after it would be lost. The loader ends its workers
    itself, at the latest when Python exits (data/loader.py). A worker that got SIGTERM also looks every `GRACE` seconds
    whether its main process is gone, and then ends.
    On Windows, which has no alarm, SIGTERM ends it at once.
    """
    main = os.getppid()

    def look(*_: object) -> None:
        if os.getppid() != main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        signal.alarm(GRACE)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if WARNING is not None:
        signal.signal(WARNING, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, look)
        signal.signal(signal.SIGTERM, look)
