"""The list of files that could not be used, and how many of them a run allows."""

from __future__ import annotations

import math
import os
from pathlib import Path

from vit_suite.data.decode import DecodeError
from vit_suite.errors import UserError
from vit_suite.files import lock

FEW = 0.2
"""Share of a set that one may want to leave out; of more, something else is wrong, such as data.channels."""


class Quarantine:
    """Files that did not decode: counted per set, listed once in a text file `path<TAB>reason`, and limited.

    `file` is `quarantine.txt` of the run directory (None: failures are only counted). It is created with the first
    entry. `limit` is the share of a set that may fail. Several ranks may write the same file: an entry is one line,
    appended under a lock after the file was read, so neither ranks nor resumed runs repeat an entry.
    """

    def __init__(self, file: str | os.PathLike | None = None, limit: float = 0.01) -> None:
        if not 0 <= limit <= 1:
            raise UserError(f"data.max_corrupt is {limit}; expected a share from 0 to 1.")
        self.file = None if file is None else Path(file)
        self.limit = limit
        self.failures: dict[str, dict[str, str]] = {}  # set -> path -> reason
        self.totals: dict[str, int] = {}  # set -> its images

    def __len__(self) -> int:
        return len({path for found in self.failures.values() for path in found})

    def __bool__(self) -> bool:
        return True  # without entries too: `quarantine or Quarantine()` must keep the one that was given

    def report(self, failures: list[DecodeError], what: str, total: int) -> None:
        """Record `failures` of the set `what` of `total` images. UserError when more than the allowed share of it
        failed. One file is always allowed, however small the set, unless the share is 0.

        Samples of a set report under the set's name. The largest total that was reported counts, because the failures
        of the whole set would be too large a share of a sample. Each rank counts only the failures that it met itself.
        """
        total = self.totals[what] = max(total, self.totals.get(what, 0))
        found = self.failures.setdefault(what, {})
        new = [failure for failure in failures if failure.path not in found]
        found.update((failure.path, failure.reason) for failure in new)
        if new:
            self._append(new)
        if len(found) > (max(1, self.limit * total) if self.limit else 0):
            path, reason = next(iter(found.items()))
            listed = f" All are listed in {self.file}." if self.file else ""
            enough = math.ceil(100 * len(found) / total) / 100
            mend = f" --data.max_corrupt {enough:g} goes on without them." if enough <= FEW else ""
            raise UserError(
                f"{len(found)} of the {total} images of {what} do not decode ({len(found) / total:.1%};"
                f" data.max_corrupt allows {self.limit:.1%}). First: {path} ({reason}).{listed}{mend}"
            )

    def list_again(self) -> None:
        """Write all entries to `file` again, after the file was removed (a run directory that starts anew)."""
        for found in filter(None, self.failures.values()):
            self._append([DecodeError(path, reason) for path, reason in found.items()])

    def _append(self, failures: list[DecodeError]) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b", buffering=0) as handle:
            lock(handle)
            handle.seek(0)
            text = handle.read()
            known = {line.split(b"\t")[0] for line in text.splitlines()}
            lines = {_escape(failure.path): failure.reason for failure in failures}
            fresh = b"".join(key + b"\t" + why.encode() + b"\n" for key, why in lines.items() if key not in known)
            if fresh:  # a line cut off by a crash must not swallow the next entry
                handle.write((b"\n" if text and not text.endswith(b"\n") else b"") + fresh)


def _escape(path: str) -> bytes:
    return os.fsencode(path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r"))
