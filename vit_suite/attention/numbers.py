"""Format `npz`: the numbers behind the pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from vit_suite.attention.drawing import Seen


def write_numbers(path: Path, seen: Seen) -> None:
    """Write `attention` (h, gh, gw), the maps that are no head (mean, max, rollout: (gh, gw)), `grid` (gh, gw),
    `image_size` (H, W), `threshold`, `path`, and with clip_artifacts `artifacts` bool (gh, gw).
    """
    named = zip(seen.labels, seen.small, strict=True)
    maps = {label: one.numpy() for label, one in named if not label.startswith("head")}
    facts = {
        "grid": seen.heads.shape[-2:],
        "image_size": seen.size,
        "threshold": seen.drawing.threshold,
        "path": seen.path,
    }
    write_npz(path, attention=seen.heads.numpy(), **maps, **seen.extra, **facts)


def write_npz(path: str | os.PathLike, /, **arrays: Any) -> None:
    """Write arrays and plain numbers by name; numpy.load(path) reads them without pickle."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    named: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez_compressed(path, **named)
