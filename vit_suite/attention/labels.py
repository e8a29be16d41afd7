"""Format `labels`: which head gives most of its mass to each pixel, as a PNG whose palette index is the head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vit_suite.attention.drawing import Seen
from vit_suite.attention.maps import upsample, winning_head
from vit_suite.attention.palette import head_colors
from vit_suite.attention.png import write_png


def write_labels(path: Path, seen: Seen) -> None:
    """Write the labels at the size of the file."""
    write_png(path, _winners(seen), head_colors(len(seen.heads)))


def _winners(seen: Seen) -> np.ndarray:
    """uint8 (H, W): the head that wins each pixel, the first of equals."""
    if seen.drawing.mode == "nearest":
        return upsample(winning_head(seen.heads), seen.size).numpy().astype(np.uint8)
    most = torch.full(seen.size, -1.0)
    winner = np.zeros(seen.size, np.uint8)
    for index, head in enumerate(seen.heads):  # one after the other: of a photograph not all fit in memory
        fine = seen.drawing.fine(head[None], seen.picture)[0]
        share = fine / fine.sum().clamp_min(torch.finfo(fine.dtype).tiny)
        winner[(share > most).numpy()] = index
        most = torch.maximum(most, share)
    return winner
