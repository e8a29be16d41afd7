"""What a run says of itself for later readers: command, data, machine, versions, git state. `RUN/about.json`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vit_suite.data.source import ImageSource
from vit_suite.errors import counted
from vit_suite.files import write_atomically

PACKAGES = ("vit-suite", "torch", "torchvision", "pytorch-lightning", "timm", "numpy", "pillow")
FINGERPRINTED = 100_000
"""Largest number of names that a fingerprint reads, evenly spread over the set: millions of files cost a second."""


def write_about(folder: Path, source: ImageSource, ranks: int, origin: Mapping[str, str]) -> None:
    """Write `folder/about.json` for a training on the images of `source` with `ranks` processes. `origin`: the weights
    that it starts from (`start`, `start_license`), empty for random ones."""
    about = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "data": {"name": source.title, "images": len(source), "classes": len(source.classes)}
        | {"fingerprint": fingerprint(source)},
        **origin,
        "machine": machine(ranks),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
    }
    text = json.dumps(about, indent=2) + "\n"
    write_atomically(folder / "about.json", lambda path: path.write_text(text, encoding="utf-8"))


def fingerprint(source: ImageSource) -> str:
    """16 hex digits of the names of the files, below their common folder, and of their labels.

    The same set gives the same value wherever it lies. Contents are not read.
    """
    count = len(source)
    step = max(1, count // FINGERPRINTED)
    chosen = range(0, count, step)
    paths = [source.path(index) for index in chosen]
    parents = {os.path.dirname(path) for path in paths}
    common = os.path.commonpath(parents) if parents and all(os.path.isabs(parent) for parent in parents) else ""
    digest = hashlib.sha256(f"{count}".encode())
    for index, path in zip(chosen, paths, strict=True):
        name = os.path.relpath(path, common) if common else path
        digest.update(f"\0{name}\0{source.label(index)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def machine(ranks: int) -> dict[str, Any]:
    """Processor, cores, memory, GPUs and processes."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
        "processes": ranks,
        "system": platform.platform(terse=True),
    }


def processor() -> str:
    """The model name of the processor as Linux gives it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> str:
    """Commit of the checkout that the package runs from, and how many files differ from it; "" outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (
            f", {counted(len(changed.splitlines()), 'file')} changed" if changed else ""
        )
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or somebody else's that git refuses
        return ""
