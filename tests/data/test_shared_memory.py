"""Workers whose batches do not fit in /dev/shm: said within a minute, where torch's own queue waits for ever."""

import os
import subprocess
import sys
import time

import pytest

from vit_suite.signals import GRACE

pytestmark = pytest.mark.alone  # has a deadline

CODE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # a mount namespace of its own
    sys.exit(77)
if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, sys.argv[1].encode()):
    sys.exit(77)
import torch
from vit_suite.config import DataConfig
from vit_suite.data import loader
from vit_suite.data.order import EpochPlan
from vit_suite.data.registry import open_train
loader.SHM_ATTEMPTS = 4
source = open_train(DataConfig(name="folder", root=sys.argv[2]), 0)
feed = loader.FileLoader(source, EpochPlan(len(source), 8), workers=2)
try:
    print(sum(len(labels) for _, labels, _ in feed))
except loader.SharedMemoryFull as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounts a small /dev/shm")
@pytest.mark.parametrize(("size", "enough"), [("size=300k", False), ("size=4m", True)])
def test_workers_and_a_small_shared_memory(tmp_path, size, enough):
    from PIL import Image

    for number in range(64):  # a batch of 8 takes 393 kB
        path = tmp_path / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (128, 128), (number, 0, 0)).save(path)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CODE, size, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    if done.returncode == 77:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 0, done.stderr
    if enough:  # the process ends although nobody closes its loader
        assert done.stdout == "64\n" and time.monotonic() - started < GRACE
    else:
        assert done.stdout.startswith("/dev/shm is full: 0 of 0 MiB are free, and a batch of the workers takes 0 MiB")
        assert "Give fewer --data.workers (0 needs none)" in done.stdout and time.monotonic() - started < 200
