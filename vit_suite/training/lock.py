"""A lock that lets one training at a time into a run directory. It names its owner, and a crash of the owner frees it.

The lock is `RUN/run.lock`. The kernel holds it for the process (a POSIX record lock). So it ends with the process,
however that ends, also over NFS. Unlike `flock` it is not inherited by the loader's workers, which may outlive a killed
training by seconds. The file names host, process and SLURM job, for the message to a second training. Its modification
time is renewed every 20 s, for file systems that do not share locks between machines.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit_suite.errors import UserError

FILE = "run.lock"
RENEWED = 20.0
"""Seconds between two renewals."""
SILENT = 90.0
"""Seconds without a renewal after which an owner on another machine counts as dead."""
HELD = (errno.EACCES, errno.EAGAIN)


def refuse_second(folder: Path) -> None:
    """UserError if another process trains in `folder`. Nothing is written; the final decision is that of `held`."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return
    try:
        _refuse_if_taken(descriptor, folder, take=False)
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of the run directory, which has to exist. UserError if another process has it."""
    path = folder / FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _refuse_if_taken(descriptor, folder, take=True)
        except BaseException:
            os.close(descriptor)
            raise
        if _is_still(path, descriptor):  # else its owner has just removed the file
            break
        os.close(descriptor)
    text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")})
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode() + b"\n")
    except OSError:  # a full disk: the lock holds, without the name of its owner
        pass
    done = threading.Event()
    threading.Thread(target=_renew, args=(path, done), daemon=True, name="run lock").start()
    try:
        yield
    finally:
        done.set()
        if _is_still(path, descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _refuse_if_taken(descriptor: int, folder: Path, take: bool) -> None:
    owner = _owner(descriptor)
    mine = owner.get("job") is not None and owner.get("job") == os.environ.get("SLURM_JOB_ID")
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not take:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)
        # The lock is free, but without locks between machines that does not mean that no other machine has it.
        silent = time.time() - os.fstat(descriptor).st_mtime
        alive = owner.get("host") not in (None, socket.gethostname()) and silent < SILENT and not mine
        advice = f"its last sign of life is {max(0, silent):.0f} s old; if it is dead, start again in {SILENT:.0f} s"
    except (ImportError, OSError) as error:
        held_now = isinstance(error, OSError) and error.errno in HELD
        alive = held_now or _lives(owner) and not mine
        advice = "wait for it, stop it, or name another run.output"
    if alive:
        who = f"process {owner.get('process', '(unknown)')} on host {owner.get('host', '(unknown)')}"
        job = f" (SLURM job {owner['job']})" if owner.get("job") else ""
        raise UserError(f"another training runs in '{folder}': {who}{job}; {advice}.")


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 1000))
        os.lseek(descriptor, 0, os.SEEK_SET)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the owner lives, for file systems without any locks. An owner on another machine counts as alive."""
    if owner.get("host") != socket.gethostname() or os.name == "nt":  # where os.kill would end it
        return bool(owner)
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, TypeError, ValueError):
        pass
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEWED):
        try:
            os.utime(path)
        except OSError:
            return
