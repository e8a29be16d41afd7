"""results.json: a list of scores, each with everything needed to repeat it."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_suite.config import LocalizeConfig, ScoreConfig
from vit_suite.errors import UserError
from vit_suite.files import locked, write_atomically
from vit_suite.places import check_file


def results_path(cfg: ScoreConfig | LocalizeConfig) -> Path:
    """The file that the scores of `cfg.checkpoint` are appended to: `cfg.output`, else results.json in the run
    directory or the working directory.

    UserError when it cannot be written or read: before the work, not after it.
    """
    folder = Path(cfg.checkpoint) if Path(cfg.checkpoint).is_dir() else Path()
    path = Path(cfg.output) if cfg.output else folder / "results.json"
    check_file("output", path)
    read_results(path)
    return path


def read_results(path: str | Path) -> list[dict]:
    """The entries of a results.json; empty when there is no file."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; name a results file with --output.")
    if not path.exists():
        return []
    remedy = "move it away or name another with --output"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is no results file ({error}); {remedy}.") from error
    if not isinstance(entries, list):
        raise UserError(f"'{path}' is no results file: expected a list of entries; {remedy}.")
    return entries


def append_result(
    path: str | Path, task: str, metrics: Mapping[str, Any], protocol: Mapping[str, Any], sha256: str | None = None
) -> dict:
    """Add an entry (task, metrics, full protocol, sha256 of the weights, command, time in UTC).

    The file is replaced in one step, and processes that append at the same time wait for each other.
    """
    path = Path(path)
    entry = {
        "task": task,
        "metrics": dict(metrics),
        "protocol": dict(protocol),
        "sha256": sha256,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        entries = [*read_results(path), entry]
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(entries, indent=2) + "\n"))
    return entry


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text columns: the first to the left, the others to the right; floats with two digits."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
