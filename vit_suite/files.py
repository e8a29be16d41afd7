"""Files that are either whole or not there, and locks on files."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""How the name of an unfinished file ends; a process that is killed leaves it behind."""


def write_atomically(path: str | Path, write: Callable[[Path], object], sync: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step: readers see the old file or
    the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private
        put_in_place(temporary, path, sync)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(partial: Path, path: Path, sync: bool = True) -> None:
    """Rename a finished file to its final name in one step. With `sync` its content reaches the disk first: without it,
    a power cut may leave the new name with an empty file."""
    if sync:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)


def remove_partial(folder: Path) -> None:
    """Delete the unfinished files in `folder` and below, which a killed process left."""
    for path in folder.rglob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def lock(handle) -> None:
    """Lock an open file until it is closed, against other threads and processes; against other machines too where the
    file system supports that. Where the file system has no locks, nothing is locked.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Only one process or thread at a time runs the block; others wait. `path` is an empty file that exists
    meanwhile."""
    while True:
        handle = open(path, "a")
        lock(handle)
        try:
            if os.path.samestat(os.stat(path), os.fstat(handle.fileno())):
                break
        except FileNotFoundError:  # its owner has just removed it
            pass
        handle.close()
    with handle:
        try:
            yield
        finally:
            Path(path).unlink(missing_ok=True)


def printable(name: str) -> str:
    """A file name as text that any file or terminal takes: bytes that are not UTF-8 and control characters are escaped
    (`caf\\xe9`, `a\\nb`)."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() or char == " " else repr(char)[1:-1] for char in text)


FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""The beginning of a cell that a spreadsheet would run as a formula, with apostrophes before it or not."""


def safe_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would run (`=cmd`) gets an apostrophe before it. Numbers stay."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def plain_cell(text: str) -> str:
    """The text from which `safe_cell` made `text`."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
