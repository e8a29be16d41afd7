"""The run directory. Whether a run is fresh, resumed or refused is decided before anything is written."""

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
from vit_suite.errors import UserError, counted
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
"""Options that a resumed run may not change, because the rest of its training would belong to another run."""
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
"""Exceptions from FIXED: they change where the data is and how fast it comes, but not the training."""
LEFT_BEHIND = ("quarantine.txt", "vit-suite-error.log", f".{CONFIG}.*", "status.json", LOCK)
"""Files that a start may leave if it fails, or is killed while it writes its config."""
LAUNCHED = ("launch.*", "slurm-*.log")
"""Files that `launch` and SLURM write before the training starts."""


def check(cfg: PretrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. Writes nothing.

    Raises:
        UserError: the directory holds no run, or a run with other settings.
    """
    folder = Path(cfg.run.output)
    if not folder.exists():
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"run.output '{folder}' cannot be made: '{above}' is a file.")
        return None
    if not folder.is_dir():
        raise UserError(f"run.output '{folder}' is a file; expected a directory.")
    if main_process():  # the other ranks would find the lock of their own first rank
        refuse_second(folder)
    # Listed before the config is looked for, because the first rank may be writing it now.
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
    """UserError if the resumed run had other images, even with the same config: files were added, removed, or moved to
    another class."""
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["data"]
        images, classes, names = int(before["images"]), int(before["classes"]), str(before["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # an old run, or one that was killed as it began
        return
    now = f"{counted(len(source), 'image')} in {counted(len(source.classes), 'class')}"
    if (images, classes) != (len(source), len(source.classes)):
        found = f"{source.title} has {now} now"
    elif names != fingerprint(source):
        found = f"the names or classes of the files of {source.title} have changed since"
    else:
        return
    raise UserError(
        f"'{folder}' holds a run on {counted(images, 'image')} in {counted(classes, 'class')}, but {found}. "
        "Put the images back to resume, name another run.output, or give --run.overwrite to start anew."
    )


def _options(folder: Path) -> dict[str, Given]:
    """The options in the folder's config.yaml; empty without one. Only the config of a run has run.output, and only the
    folder of a run may be emptied."""
    try:
        return read_yaml(folder / CONFIG)
    except UserError:
        return {}


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint. UserError if it cannot be read."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # torch raises many types of errors for broken files
        others = [path.name for path in sorted(checkpoint.parent.glob("*.ckpt")) if path != checkpoint]
        instead = f"put another in its place ({', '.join(others)}), or " if others else ""
        raise UserError(
            f"cannot resume: '{checkpoint}' is damaged or no checkpoint ({type(error).__name__}); "
            f"{instead}give --run.overwrite to start anew."
        ) from error


def create(cfg: PretrainConfig) -> Path:
    """Make the directory (with run.overwrite: empty it) and save the resolved config in it.

    The old config goes last, replaced by the new one. A process that is killed before leaves a folder that is still
    recognized as a run.
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
    """Remove what `create`, and a start without a single step, wrote into a fresh run directory. quarantine.txt stays,
    because the error message names it."""
    for name in (CONFIG, ABOUT, STATUS, "metrics.csv", "checkpoints"):
        path = folder / name
        if path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def recorded(folder: Path, sha256: str) -> bool:
    """Whether results.json has an entry for the training that ended with these weights."""
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
