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
    """Rename a file that is written to its final name, in one step; with `sync` its content reaches the disk first,
    since otherwise a power cut may leave the new name with nothing behind it."""
    if sync:
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)


def remove_partial(folder: Path) -> None:
    """Delete what a process that was killed in the middle of writing left in `folder` and below."""
    for path in folder.rglob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def lock(handle) -> None:
    """Exclusive until the file is closed, for threads, processes and, where the file system passes locks on, machines.

    Where it has none, nothing is locked.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One at a time: whoever comes second waits here. `path` is an empty file that is there meanwhile."""
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


FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How a cell begins that a spreadsheet runs, or takes for one that it should not."""


def safe_cell(value: object) -> object:
    """A cell of a CSV file: text that a spreadsheet would run (`=cmd`) gets an apostrophe before it. Numbers stay."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def plain_cell(text: str) -> str:
    """What `safe_cell` was given."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text
