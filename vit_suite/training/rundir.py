"""The run directory: fresh, resumed, or refused, decided before anything is written."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from vit_suite.config import VERSION, PretrainConfig
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.files import remove_partial, write_atomically
from vit_suite.logs import main_process
from vit_suite.parsing import Given, dump_config, load_config, read_yaml
from vit_suite.reports.about import fingerprint
from vit_suite.reports.results import read_results
from vit_suite.training.lock import FILE as LOCK
from vit_suite.training.lock import refuse_second
from vit_suite.training.status import FILE as STATUS

CONFIG = "config.yaml"
ABOUT = "about.json"
FIXED = ("start", "method", "backbone", "views", "optim", "data", "run.seed")
"""What a resumed run may not change: the rest of its training would be another run's."""
FREE = (
    "data.root",
    "data.workers",
    "data.resident",
    "data.memory_gb",
    "data.max_corrupt",
    "data.download",
    "views.backend",
    "backbone.checkpointing",
    "method.crops_at_once",
)
"""Except these, which change where things are and how fast they come, not what they are."""
LEFT_BEHIND = ("quarantine.txt", "vit-suite-error.log", f".{CONFIG}.*", "status.json", LOCK)
"""What a start that failed, or was killed while it wrote its config, may have put there."""
LAUNCHED = ("launch.*", "slurm-*.log")
"""What a job that is about to start has there already, and writes to."""


def check(cfg: PretrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. Writes nothing.

    Raises:
        UserError: the directory is something else's, or its run was started with other settings.
    """
    folder = Path(cfg.run.output)
    if not folder.exists():
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"run.output '{folder}' cannot be made: '{above}' is a file.")
        return None
    if not folder.is_dir():
        raise UserError(f"run.output '{folder}' is a file; expected a directory.")
    if main_process():  # the other ranks find the lock of their own first rank
        refuse_second(folder)
    # Listed before the config is looked for: other ranks come while the first one starts the run.
    found = list(folder.iterdir())
    written = _options(folder)
    if "run.output" not in written:
        if not all(_matches(path, LEFT_BEHIND + LAUNCHED) for path in found):
            consequence = "it will not be deleted" if cfg.run.overwrite else "name another"
            raise UserError(
                f"run.output '{folder}' is not empty and no run directory (no {CONFIG} of a run); {consequence}."
            )
        return None
    if cfg.run.overwrite:
        return None
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return None
    version = written.get("version")
    if version is None or version.value != str(VERSION):
        number = "of an earlier version" if version is None else f"of version {version.value}"
        raise UserError(
            f"'{folder}' holds a run whose {CONFIG} has the options {number}, and this vit-suite has version {VERSION}:"
            " resume it with the vit-suite that began it, name another run.output, or give --run.overwrite to start"
            " anew."
        )
    before = _flat(asdict(load_config(folder / CONFIG, cls=type(cfg))))
    now = _flat(asdict(cfg))
    changed = [key for key in now if key.startswith(FIXED) and key not in FREE and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"'{folder}' holds a run with {key} {before.get(key)}, not {now[key]}{more}. "
            "Repeat its settings to resume, name another run.output, or give --run.overwrite to start anew."
        )
    return last


def check_images(folder: Path, source: ImageSource) -> None:
    """UserError when the images of the run that is resumed were others, whatever its config says: files that came, went
    or changed their class since."""
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["data"]
        images, classes, names = int(before["images"]), int(before["classes"]), str(before["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # an old run, or one that was killed as it began
        return
    now = f"{len(source)} images in {len(source.classes)} classes"
    if (images, classes) != (len(source), len(source.classes)):
        found = f"{source.title} has {now} now"
    elif names != fingerprint(source):
        found = f"the names or classes of the files of {source.title} have changed since"
    else:
        return
    raise UserError(
        f"'{folder}' holds a run on {images} images in {classes} classes, but {found}. "
        "Put the images back to resume, name another run.output, or give --run.overwrite to start anew."
    )


def _options(folder: Path) -> dict[str, Given]:
    """The options in the folder's config.yaml. Only that of a run has run.output, and only what a run left may be
    deleted."""
    try:
        return read_yaml(folder / CONFIG)
    except UserError:
        return {}


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint. UserError when it cannot be read."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # torch raises many types for the ways a file can be broken
        others = [path.name for path in sorted(checkpoint.parent.glob("*.ckpt")) if path != checkpoint]
        instead = f"put another in its place ({', '.join(others)}), or " if others else ""
        raise UserError(
            f"cannot resume: '{checkpoint}' is damaged or no checkpoint ({type(error).__name__}); "
            f"{instead}give --run.overwrite to start anew."
        ) from error


def create(cfg: PretrainConfig) -> Path:
    """Make the directory (emptied with run.overwrite) and save the resolved config in it.

    The old config goes last, when the new one takes its place: a process that is killed in the middle leaves what is
    known for a run.
    """
    folder = Path(cfg.run.output)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.run.overwrite:
        for path in folder.iterdir():  # one by one: the folder itself may be a link to a larger disk
            if path.name not in (CONFIG, LOCK) and not _matches(path, LAUNCHED):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    remove_partial(folder)
    write_atomically(folder / CONFIG, lambda path: path.write_text(f"version: {VERSION}\n{dump_config(cfg)}"))
    return folder


def take_back(folder: Path) -> None:
    """Remove what `create` and a start that came to no step wrote into a fresh run directory; quarantine.txt, which the
    message names, stays."""
    for name in (CONFIG, ABOUT, STATUS, "metrics.csv", "checkpoints"):
        path = folder / name
        if path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def recorded(folder: Path, sha256: str) -> bool:
    """Whether results.json has the training of these weights."""
    return any(
        entry["task"] in ("pretrain", "finetune") and entry["sha256"] == sha256
        for entry in read_results(folder / "results.json")
    )


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _flat(values: dict, prefix: str = "") -> dict:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
