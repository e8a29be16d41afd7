"""A disk that fills, and a folder that loses its permission, in mid-training: said in one line, and the run goes on."""

import os
import subprocess
import sys

import pytest

from ..commands.conftest import words
from .test_rundir import sha256

MOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # a mount namespace of its own
    sys.exit(77)
if libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, sys.argv[2].encode()):
    sys.exit(77)
import subprocess
first = subprocess.run([sys.executable, "-m", "vit_suite", *sys.argv[3:]], capture_output=True, text=True, timeout=300)
left = sorted(name for name in os.listdir(sys.argv[1] + "/run/checkpoints") if name.endswith(".partial"))
print(first.returncode, left, first.stderr.strip().splitlines()[-1])
libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0x20, b"size=64m")
second = subprocess.run([sys.executable, "-m", "vit_suite", *sys.argv[3:]], capture_output=True, text=True, timeout=300)
print(second.returncode)
import json
print(json.load(open(sys.argv[1] + "/run/backbone.json"))["sha256"])
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounts a small disk")
def test_a_disk_that_filled_and_then_had_room(tiny_run, tmp_path):
    (tmp_path / "disk").mkdir()
    command = ["pretrain", *words(run__output=tmp_path / "disk" / "run")]
    done = subprocess.run(
        [sys.executable, "-c", MOUNT, str(tmp_path / "disk"), "size=500k", *command], capture_output=True, text=True
    )
    if done.returncode == 77:
        pytest.skip("this machine lets nobody mount")
    first, status, digest = done.stdout.splitlines()
    assert first.startswith("1 [] vit-suite: error: RuntimeError: '") and "checkpoints/" in first, done.stderr
    assert "cannot be written at step" in first and "the disk is full. Mend that and give the same command" in first
    assert status == "0" and digest == sha256(tiny_run)


LOST = """
import os, sys
from pathlib import Path
from vit_suite.training.keeper import not_written
os.setgid(65534); os.setuid(65534)
path = Path(sys.argv[1]) / "last.ckpt"
print(not_written(path, path.with_name("last.ckpt.partial"), FileNotFoundError(2, "No such file", "last.ckpt"), 7))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_lost_its_permission_is_named(tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", LOST, str(tmp_path)], capture_output=True, text=True, timeout=200)
    expected = f"'{tmp_path}/last.ckpt' cannot be written at step 7: no permission. Mend that and give the same command"
    assert done.stdout.startswith(expected), done.stderr
