"""Standard output that a closed pipe or a full disk does not turn into a lost result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class PatientStream:
    """A text stream that goes silent when it can no longer be written (`vit-suite knn ... | head -1`), so that the
    command still finishes and writes its files."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None
        """Why it went silent; of a pipe whose reader has seen enough there is nothing to say."""

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: Any) -> None:
        if self._stream.closed:
            return
        try:
            call(*arguments)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.error = error
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: Any) -> None:
    """Send what is left in the stream's buffer, and all that follows, to nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no file of the system, as under a test
        pass


@contextmanager
def patient_output() -> Iterator[PatientStream]:
    """Make stdout and stderr patient; one that is closed (`>&-`) goes nowhere."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:  # keeps the number too, or the next file that is opened would get it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", closefd=False))
    before = sys.stdout, sys.stderr
    out, err = PatientStream(sys.stdout), PatientStream(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        if (sys.stdout, sys.stderr) == (out, err):
            sys.stdout, sys.stderr = before
