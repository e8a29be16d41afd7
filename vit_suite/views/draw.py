"""Which random numbers a micro-batch takes: drawn on the CPU for the GLOBAL batch of a step and cut to the rows of a
rank.

So 1 rank and N ranks, whole and accumulated batches, and a resumed run see the same views, corruptions and mixtures.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The place of a micro-batch: `rows` of the `total` images of optimizer step `step` of an epoch."""

    seed: int
    epoch: int
    step: int
    rows: slice
    total: int

    def generator(self, purpose: str = "views") -> torch.Generator:
        """A CPU generator of this step; every purpose has numbers of its own, every rank the same ones."""
        # PyTorch's Mersenne Twister is seeded with the low 32 bits, so that is what the hash has to fill.
        parts = [self.seed, self.epoch, self.step] + ([] if purpose == "views" else [zlib.crc32(purpose.encode())])
        state = np.random.SeedSequence([int(value) % 2**64 for value in parts]).generate_state(1, np.uint32)
        return torch.Generator().manual_seed(int(state[0]))

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        """(B, *shape) uniform numbers in [0, 1) for the rows, on the CPU."""
        return torch.rand(self.total, *shape, generator=self.generator(purpose))[self.rows]

    def partners(self, device: torch.device | str = "cpu") -> Tensor:
        """(B,) the row that each of this micro-batch's rows is paired with: its neighbour, or the next one if their
        number is odd.

        The order of an epoch is random, so a neighbour is a random other image. Pairs never straddle ranks, so any
        number of ranks pairs alike as long as each has an even number of rows. A single row is its own partner.
        """
        count = self.rows.stop - self.rows.start
        index = torch.arange(count, device=device)
        return index ^ 1 if count % 2 == 0 else (index + 1) % count


def alone(count: int, seed: int = 0, epoch: int = 0, step: int = 0) -> Draw:
    """The draw of a batch of `count` images that is a whole step."""
    return Draw(seed, epoch, step, slice(0, count), count)
