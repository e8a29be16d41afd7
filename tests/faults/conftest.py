"""Trainings that are interrupted, and what they must end with: the same as the one that nothing interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.commands.conftest import column, pretrain, results, rows, sha256, threads, vit_suite, words  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts its background jobs with SIGINT ignored, which `vit_suite` and its children respect."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: Path, **options) -> subprocess.Popen:
    """The tiny run as a process of its own."""
    command = [sys.executable, "-m", "vit_suite", "pretrain", *words(run__output=folder, **options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_checkpoint(child: subprocess.Popen, folder: Path) -> None:
    """Until the process has written last.ckpt."""
    end = time.monotonic() + 240
    while not (folder / "checkpoints" / "last.ckpt").exists():
        assert child.poll() is None and time.monotonic() < end, child.communicate()[1]
        time.sleep(0.01)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)


def tensors(tree, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dicts and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {key: value for name, branch in items for key, value in tensors(branch, f"{path}.{name}").items()}


def assert_same(folder: Path, straight: Path, lost_rows: int = 0) -> None:
    """Weights, center, optimizer to the bit; scores, and log but for `lost_rows` of steps that a kill broke off."""
    assert sha256(folder) == sha256(straight)
    ours, theirs = checkpoint(folder), checkpoint(straight)
    assert ours["global_step"] == theirs["global_step"] and ours["epoch"] == theirs["epoch"]
    for part in ("state_dict", "optimizer_states"):
        a, b = tensors(ours[part]), tensors(theirs[part])
        assert a.keys() == b.keys() and len(a) > 10
        assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert results(folder)[-1]["metrics"].get("knn_top1_by_epoch") == results(straight)[-1]["metrics"].get(
        "knn_top1_by_epoch"
    )
    for name in ("train/loss", "knn/top1"):
        ours, theirs = column(folder, name), column(straight, name)
        assert len(theirs) - lost_rows <= len(ours) <= len(theirs) and set(ours) <= set(theirs)
    if not lost_rows:
        assert [row["step"] for row in rows(folder)] == [row["step"] for row in rows(straight)]
    assert not list(folder.rglob("*.partial"))
