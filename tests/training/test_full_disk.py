"""A disk that fills, and a folder that loses its permission, in mid-training: said in one line, and the run goes on."""

import os
import subprocess
import sys
import tempfile

import pytest

from ..commands.conftest import words
from .test_rundir import sha256

NOBODY = 65534

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


LOSES = """
import os, sys, threading, time
from pathlib import Path
from vit_suite import cli
mine, theirs, *words = sys.argv[1:]
assert cli.main(["pretrain", *words, "--run.output", mine]) == 0  # imports everything, while it is allowed to
os.setgid(65534); os.setuid(65534)
command = ["pretrain", *words, "--run.output", theirs, "--trainer.max_epochs", "20"]
folder = Path(theirs, "checkpoints")
def lose():
    while not (folder / "last.ckpt").exists():
        time.sleep(0.005)
    folder.chmod(0o500)
threading.Thread(target=lose, daemon=True).start()
print("first", cli.main(command))
folder.chmod(0o700)
print("second", cli.main(command))
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="becomes another user")
def test_a_folder_that_loses_its_permission_in_mid_training(tmp_path):
    """The training ends with the folder's name and the reason, and goes on when the permission is back."""
    own = words(run__output=None, evaluate__every_epochs=0, trainer__max_epochs=1)
    with tempfile.TemporaryDirectory() as theirs:  # not below tmp_path, where only root may look
        os.chown(theirs, NOBODY, NOBODY)
        command = [sys.executable, "-c", LOSES, str(tmp_path / "mine"), f"{theirs}/run", *own]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=theirs)
    assert done.stdout.split()[-4:] == ["first", "1", "second", "0"], done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "vit-suite: error" in line]
    assert "run/checkpoints/last.ckpt' cannot be written at step" in line
    assert "no permission. Mend that and give the same command" in line
