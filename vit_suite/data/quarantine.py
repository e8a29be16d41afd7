"""The list of files that could not be used, and how many of them a run allows."""

from __future__ import annotations

import os
from pathlib import Path

from vit_suite.data.decode import DecodeError
from vit_suite.errors import UserError
from vit_suite.files import lock


class Quarantine:
    """Files that did not decode: counted per set, listed once in a text file `path<TAB>reason`, and limited.

    `file` is `quarantine.txt` of the run directory (None: only counted); it and its folder come into being with the
    first entry. `limit` is the share of a set that may fail. Several ranks may write the same file: each entry is one
    appended line, written under a lock after reading what is there, so that neither ranks nor resumed runs repeat one.
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
        return True  # an empty one is still there: `quarantine or Quarantine()` must keep it

    def report(self, failures: list[DecodeError], what: str, total: int) -> None:
        """Record `failures` of the set `what` of `total` images. UserError when the set now has more than its share of
        them.

        Samples of a set report under its name: the largest total counts, lest a sample be charged with all of the set's
        failures.
        Each rank counts what it has met itself.
        """
        total = self.totals[what] = max(total, self.totals.get(what, 0))
        found = self.failures.setdefault(what, {})
        new = [failure for failure in failures if failure.path not in found]
        found.update((failure.path, failure.reason) for failure in new)
        if new:
            self._append(new)
        if found and len(found) > self.limit * total:
            path, reason = next(iter(found.items()))
            listed = f" All are listed in {self.file}." if self.file else ""
            raise UserError(
                f"{len(found)} of the {total} images of {what} do not decode ({len(found) / total:.1%};"
                f" data.max_corrupt allows {self.limit:.1%}). First: {path} ({reason}).{listed}"
            )

    def list_again(self) -> None:
        """Write what has been reported to `file` once more, where it was removed since (a run directory that starts
        anew)."""
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
