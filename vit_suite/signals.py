"""Signals that ask a training to stop. A handler only notes them; the training answers after the step.

SIGUSR1 is a cluster's warning (SLURM: `--signal=USR1@90`), SIGTERM its request to end (`scancel`, `kill`), SIGINT
Ctrl-C. Nothing is saved inside a handler, because it runs between any two bytecodes, when half a step is done and other
ranks are elsewhere. Windows has no SIGUSR1: there is no warning there, and the rest works.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

WARNING: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""A cluster's warning that a job's time is nearly up; None on Windows."""
TRY_AGAIN = 75
"""Exit status EX_TEMPFAIL of sysexits.h, which Windows' `os` does not name."""
STATUS: dict[int, int] = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
"""Signal -> exit status of a training that it stopped: 143 and 130 are what shells give, 75 means "try again"."""
if WARNING is not None:
    STATUS[WARNING] = TRY_AGAIN
ECHO = 1.0
"""Seconds within which a repeated signal is the same request: a launcher and the system may both deliver it."""
GRACE = 60
"""Seconds that a loader's worker process lives on after SIGTERM."""


class Stopped(Exception):
    """A signal ended the training after `step` optimizer steps; its checkpoint is saved. `status` is the command's exit
    status."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.signal, self.step = signal.Signals(number), step
        self.status = STATUS[self.signal]
        self.advice = "the same command goes on"

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} at step {self.step}, checkpoint saved; {self.advice}"


class Signals:
    """Notes signals between `with` and its end. `noted` is the number of the first one, 0 without.

    SIGUSR1 is noted from the start. SIGTERM and SIGINT are noted only after `listen()`: before the first step there is
    nothing to save, and they end the process as usual. A second SIGTERM or SIGINT ends it at once; SIGUSR1 stays a
    warning, however often it comes.
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
        """From now on SIGTERM and SIGINT are noted too, by this alone: the handlers of others are set aside."""
        self._note(signal.SIGTERM)
        # nohup, and shells for background jobs, shield a process from Ctrl-C.
        if self._before[signal.SIGINT] is not signal.SIG_IGN:
            self._note(signal.SIGINT)

    def _note(self, number: int) -> None:
        self._set(number, self._handle)

    @staticmethod
    def _set(number: int, handler: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number != WARNING and now - self._came.get(number, now) > ECHO:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        self._came.setdefault(number, now)
        self.noted = self.noted or number


def outlive(worker: int = 0) -> None:
    """Make this process, a worker of the loader, leave signals to the main process.

    Ctrl-C reaches every process of a terminal, and a cluster may signal every process of a job. If a worker died of it,
    the step under way, and the checkpoint after it, would be lost. SIGTERM still ends the worker, `GRACE` seconds
    later; on Windows, which has no alarm, at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if WARNING is not None:
        signal.signal(WARNING, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
