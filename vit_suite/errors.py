"""The one exception a user's mistake raises, and the nearest-name hint that goes with it.

Anything that the user can put right (a key, a path, a name, a number) raises `UserError` with one sentence that says
what, where, and what was expected; the command line prints it and exits with status 2. Every other exception is a fault
of ours: status 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong; the message is shown to the user as it stands, without a traceback."""


QUOTED = 80
"""Most characters of a user's value that a message repeats."""


def short(text: str) -> str:
    """A name or a word as a message shows it: its first 80 characters."""
    return text if len(text) <= QUOTED else text[: QUOTED - 3] + "..."


def quote(value: object) -> str:
    """`repr(value)`; for a long value its first characters and its length."""
    if isinstance(value, str):
        return repr(value) if len(value) <= QUOTED else f"{value[:60]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and abs(value) >= 10**QUOTED:  # Python refuses to spell one of 4,300 digits
        return f"a number of {math.ceil(value.bit_length() * math.log10(2)):,} digits"
    try:
        return short(repr(value))
    except Exception:  # an object from Python whose repr fails
        return f"a {type(value).__name__}"


def counted(number: int, thing: str) -> str:
    """`1 image`, `2 images`, `0 images`; `1 class`, `2 classes`; `2 epochs`."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{ending}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `known`, or an empty string when none is close."""
    match = difflib.get_close_matches(short(str(word)), [str(name) for name in known], n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def unknown_name(kind: str, word: str, known: Iterable[str], shown: int = 20) -> UserError:
    """The error for a name that is not in a registry: kind, word, nearest valid name, and the (first) valid names."""
    names = list(known)
    listed = ", ".join(names[:shown]) + (f" ... ({len(names)} in all)" if len(names) > shown else "")
    return UserError(f"unknown {kind} '{short(word)}'.{nearest(word, names)} Known: {listed}.")
