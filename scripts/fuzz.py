"""Feed wrong values to everything a stranger can write: options, YAML, weights' metadata, shards, masks, boxes, lists;
and start trainings with values that the schema allows.

    python scripts/fuzz.py --cases 3000            # the kinds in turn
    python scripts/fuzz.py --cases 300 --kind options --seed 7

A case is right when it is accepted, or refused by one UserError of at most 400 characters. Everything else is listed:

    traceback   another exception, which a user would see as "error: TypeError ..."
    nonsense    accepted, though no number, path or list can look like this, or it does not survive a round trip
    leftover    a refused case left a file behind
    hang        it took longer than 10 s
    long        the message has more than 400 characters or a line break

Exit status: 0 when nothing is listed, else 1. The same seed draws the same cases.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_files import list_cases, shard_cases, truth_cases, weight_cases
from fuzz_options import Case, option_cases, start_cases

from vit_suite.errors import UserError

LIMIT = 10
"""Seconds after which a case counts as a hang."""
LONGEST = 400
"""Characters of a message, the paths of the case left out."""
QUIET = ("vit_suite", "pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric")


class Finding(NamedTuple):
    kind: str
    case: str
    said: str


KINDS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "options": option_cases,
    "start": start_cases,
    "weights": weight_cases,
    "shards": shard_cases,
    "truth": truth_cases,
    "lists": list_cases,
}

SHARE = {"options": 2, "start": 15, "weights": 6, "shards": 6, "truth": 6, "lists": 15}
"""The cases divided by this number are of a kind: half are options, and starts and lists come on top."""


class TooLong(BaseException):
    """A case that went beyond its time."""


def judge(case: Case, folder: Path) -> tuple[str, Finding | None]:
    """("accepted" or "refused", what is wrong with that)."""

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            wrong = case.run()
        return "accepted", Finding("nonsense", case.text, wrong) if wrong else None
    except UserError as error:
        said = str(error).replace(str(folder), "")
        kind = "long" if len(said) > LONGEST else None
        return "refused", Finding(kind, case.text, said[:200]) if kind else None
    except TooLong:
        return "refused", Finding("hang", case.text, f"more than {LIMIT} s")
    except Exception as error:
        return "refused", Finding("traceback", case.text, f"{type(error).__name__}: {error!s:.200}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The loggers of thousands of cases say nothing; their levels are afterwards as before."""
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fuzz(kind: str, cases: int, seed: int) -> tuple[collections.Counter, list[Finding]]:
    """Try `cases` cases of a kind; counts of accepted and refused, and what is wrong."""
    rng, counts, findings = random.Random(f"{kind} {seed}"), collections.Counter(), []
    here = Path.cwd()
    with quiet(), tempfile.TemporaryDirectory(prefix="vit-suite-fuzz-") as name:
        folder, empty = Path(name) / "files", Path(name) / "empty"
        folder.mkdir()
        empty.mkdir()
        os.chdir(empty)  # where a relative output would land
        try:
            for _, case in zip(range(cases), KINDS[kind](rng, folder), strict=False):
                answer, finding = judge(case, folder)
                counts[answer] += 1
                if finding:
                    findings.append(finding)
                for left in empty.iterdir():
                    findings.append(Finding("leftover", case.text, left.name))
                    left.rename(Path(name) / f"left{len(findings)}")
        finally:
            os.chdir(here)
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=40, help="findings listed of each kind")
    arguments = parser.parse_args()
    chosen = arguments.kind or list(KINDS)
    total: collections.Counter = collections.Counter()
    for kind in chosen:
        share = arguments.cases if len(chosen) == 1 else arguments.cases // SHARE[kind]
        started = time.perf_counter()
        counts, findings = fuzz(kind, share, arguments.seed)
        kinds = collections.Counter(finding.kind for finding in findings)
        listed = ", ".join(f"{count} {name}" for name, count in kinds.items()) or "nothing wrong"
        print(
            f"{kind:<8} {share:5d} cases: {counts['accepted']} accepted, {counts['refused']} refused;"
            f" {listed}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        for finding in findings[: arguments.show]:
            print(f"  {finding.kind}: {finding.case!r:.160} -> {finding.said!r:.200}")
        total += kinds
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
