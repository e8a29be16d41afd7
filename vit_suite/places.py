"""What a command reads and writes on the disk, checked before torch is imported: a mistyped path costs no ten seconds,
and a folder that cannot be written no hours of work.

Options say with `Place` (config/limits.py) what they name. Nothing is created here.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vit_suite.config.limits import Place
from vit_suite.errors import UserError, nearest, short

LONGEST_NAME = 255
"""Bytes of a file's name that Linux file systems take."""
LONGEST_PATH = 4000
"""Bytes of a path; Linux takes 4,096, and a command adds names of its own files."""
SUFFIX_ROOM = 24
"""Bytes that `write_atomically` adds to a name while the file is being written."""
COMPARED = 1000
"""Names in a folder that are compared with a mistyped one."""
SCHEME = re.compile(r"[a-z][a-z0-9_-]+:")
"""How a checkpoint begins that is no path: `timm:vit_small_patch16_224`."""
PATTERN = re.compile(r"[*?\[{]")
"""What makes a data root a pattern of shards: `train-{000..127}.tar`."""


def check_places(config: Any, skip: Callable[[str], bool] = lambda key: False) -> None:
    """UserError for an input that is not there or an output that cannot be written, named by its option."""
    for key, place, value, owner in _places(config, ""):
        if skip(key):
            continue
        _check_names(key, value)
        if place.kind == "folder":
            check_folder(key, Path(value))
        elif place.kind == "file" or place.kind == "output" and not Path(value).is_dir():
            check_file(key, Path(value))
        elif place.kind == "output":
            check_folder(key, Path(value).parent)
        elif place.kind == "data":
            if not (PATTERN.search(value) or getattr(owner, "download", False) or owner.name == "shapes"):
                check_input(key, value)
        elif place.kind == "input" or place.kind == "checkpoint" and not SCHEME.match(value):
            check_input(key, value)


def check_input(key: str, value: str) -> None:
    """UserError unless `value` is a file or folder, with the nearest name beside it."""
    path = Path(value)
    try:
        if not (path.is_file() or path.is_dir()) and path.exists():  # opening a pipe would wait for a writer
            raise UserError(f"{key} '{value}' is a pipe, a socket or a device; expected a file or a folder.")
        path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{key} '{value}' is a link to '{os.readlink(path)}', which does not exist.") from None
        raise UserError(f"{key} '{value}' does not exist.{_neighbour(path)}") from None
    except OSError as error:
        raise UserError(f"{key} '{value}' cannot be read: {reason(error)}.") from None


def check_folder(key: str, folder: Path) -> None:
    """UserError unless `folder` is, or can become, a folder that this process writes into."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        what = "is a broken link" if there.is_symlink() and not there.exists() else "is a file"
        if there == folder:
            raise UserError(f"{key} '{folder}' {what}; expected a directory.")
        raise UserError(f"{key} '{folder}' cannot be made: '{there}' {what}.")
    if why := why_not_written(there):
        advice = "make room, or name another" if why in FULL else "name another, or ask its owner for access"
        raise UserError(f"{key} '{folder}': '{there}' cannot be written: {why}; {advice}.")


def check_new_folder(key: str, folder: Path, overwrite: bool) -> None:
    """As `check_folder`; UserError too for a folder that holds something, unless `overwrite`."""
    check_folder(key, folder)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{key} '{folder}' is not empty; name another folder, or give --overwrite to replace its files."
        )


def check_file(key: str, path: Path) -> None:
    """UserError unless a file can be written at `path`, over an old one too."""
    if path.is_dir():
        raise UserError(f"{key} '{path}' is a folder; name a file in it.")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{key} '{path}' is there and cannot be written: no permission; name another.")
    check_folder(key, path.parent)


REASONS = {
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.ELOOP: "its links run in a circle",
    errno.ENOTDIR: "a part of it is a file",
}
FULL = (REASONS[errno.ENOSPC], REASONS[errno.EDQUOT])


def why_not_written(folder: Path) -> str | None:
    """Why no file can be written in `folder`, which is there; None when one can.

    A file without a name is written and thrown away again. Only this tells permissions, quotas and read-only disks on
    every file system.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return reason(error)
    return None


def reason(error: OSError) -> str:
    """Why the system refused, in words."""
    return REASONS.get(error.errno or 0, error.strerror or str(error))


def _places(config: Any, group: str) -> Iterator[tuple[str, Place, str, Any]]:
    """(dotted key, place, path, the object that has it) of every option that names something on the disk."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        key, value = f"{group}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _places(value, f"{key}.")
        elif place := _place(hints[field.name]):
            for path in value if isinstance(value, list) else [value]:
                if path is not None:
                    yield key, place, path, config


def _place(hint: Any) -> Place | None:
    own = next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Place)), None)
    return own or next((found for inner in get_args(hint) if (found := _place(inner))), None)


def _check_names(key: str, value: str) -> None:
    for name in Path(value).parts:
        if len(os.fsencode(name)) > LONGEST_NAME - SUFFIX_ROOM:
            raise UserError(
                f"{key}: the name '{short(name)}' has {len(os.fsencode(name)):,} bytes;"
                f" at most {LONGEST_NAME - SUFFIX_ROOM} are possible."
            )
    if len(os.fsencode(value)) > LONGEST_PATH:
        raise UserError(
            f"{key}: the path '{short(value)}' has {len(os.fsencode(value)):,} bytes; at most {LONGEST_PATH:,} are"
            " possible."
        )


def _neighbour(path: Path) -> str:
    """`" Did you mean 'DIR/name'?"`, looked for in the folder that would hold the path."""
    try:
        names = sorted(os.listdir(path.parent))[:COMPARED]
    except OSError:
        return ""
    return nearest(path.name, names)
