"""What C libraries print while they decode a file, logged once with the file's name.

libjpeg and libtiff write warnings ("Corrupt JPEG data: ...") to the standard error of the process: without the name of
the file, and sometimes hundreds of lines for one. `Listening` catches them. While a file is decoded, descriptor 2 leads
to a file in memory. Whatever else was written there meanwhile, such as a progress bar, is passed on. That costs 10 us a
file: 11% of decoding a JPEG of 32 px, and nothing beside that of a photograph.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading

from vit_suite.files import printable

log = logging.getLogger("vit_suite")

STDERR = 2
DECODERS = re.compile(rb"JPEG|TIFF|Warning,|libpng|libwebp|webp|heif", re.IGNORECASE)
"""How a line of a decoder is told from another one."""
MOST_FILES = 20
"""Files that a process names; a set of thousands of slightly damaged files would fill the log."""


class _Ear:
    """Descriptor 2 of this process, led to a file while at least one thread decodes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.paths: list[str] = []
        """Files that are being decoded, one for each thread."""
        self.heard: int | None = None
        """Descriptor of the file that takes the messages; made when it is first needed."""
        self.real = -1
        """The process's own standard error, while descriptor 2 leads to the file."""
        self.named = 0

    def open(self, path: str) -> bool:
        """Begin to listen; False where this process has no standard error to listen to."""
        with self.lock:
            if not self.paths:
                try:
                    self.real = os.dup(STDERR)
                    if self.heard is None:
                        self.heard = _memory_file()
                    os.dup2(self.heard, STDERR)
                except OSError:
                    return False
            self.paths.append(path)
            return True

    def close(self, path: str) -> None:
        """Stop listening to one file, and log what was heard."""
        with self.lock:
            assert self.heard is not None
            text = b""
            if size := os.fstat(self.heard).st_size:
                text = os.pread(self.heard, size, 0)
                os.ftruncate(self.heard, 0)
            suspects = [path, *(other for other in self.paths if other != path)]
            self.paths.remove(path)
            if not self.paths:
                os.dup2(self.real, STDERR)
            if text:
                self._answer(text, suspects)
            if not self.paths:
                os.close(self.real)

    def _answer(self, text: bytes, suspects: list[str]) -> None:
        lines = text.splitlines(keepends=True)
        said = [line.decode(errors="replace").strip() for line in lines if DECODERS.search(line)]
        if rest := b"".join(line for line in lines if not DECODERS.search(line)):
            os.write(self.real, rest)
        if not said or self.named > MOST_FILES:
            return
        self.named += 1
        if self.named > MOST_FILES:
            log.warning("warnings of decoders about further files are not shown")
            return
        names = ", ".join(map(printable, suspects))
        where = names if len(suspects) == 1 else f"one of {names}"
        log.warning("%s: the decoder warns: %s%s", where, said[0][:200],
                    f" ({len(said) - 1} more lines)" if len(said) > 1 else "")  # fmt: skip

    def after_fork(self) -> None:
        """A child has its own descriptors: it begins anew, with the standard error of its parent."""
        if self.paths:
            os.dup2(self.real, STDERR)
        self.lock, self.paths, self.heard, self.named = threading.Lock(), [], None, 0


def _memory_file() -> int:
    """Descriptor of a nameless file; each write goes to its end."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    import fcntl

    number = os.memfd_create("decoder-messages", os.MFD_CLOEXEC)
    fcntl.fcntl(number, fcntl.F_SETFL, os.O_APPEND)
    return number


_ear = _Ear()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ear.after_fork)


class Listening:
    """`with Listening(path): ...` around the decoding of one file."""

    def __init__(self, path: str) -> None:
        self.path, self.open = path, False

    def __enter__(self) -> None:
        self.open = _ear.open(self.path)

    def __exit__(self, *_: object) -> None:
        if self.open:
            _ear.close(self.path)
