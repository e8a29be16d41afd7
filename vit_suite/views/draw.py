"""Which random numbers a micro-batch takes, on the CPU.

Every number belongs to a place: seed, epoch, optimizer step, purpose, and row of the GLOBAL batch of the step. So 1
rank and N ranks, whole and accumulated batches, and a resumed run see the same views, corruptions, mixtures and dropped
paths. The numbers come from Philox, a generator that counts (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"): a rank starts its counter at its first row and draws no number of another rank's rows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PER_COUNT = 8
"""float32 numbers from one value of Philox's counter: four 64-bit words, two numbers a word."""
SLICE = 128
"""Rows of the global batch that share what is drawn once for many images: a lambda, a rectangle, a strength. An even
number, so that no pair of `Draw.partners` is cut."""


@dataclass(frozen=True)
class Draw:
    """The place of a micro-batch: `rows` of the `total` images of optimizer step `step` of an epoch.

    Example: with a global batch of 512 on 4 ranks, rank 1 has rows 128 to 256 of 512.
    """

    seed: int
    epoch: int
    step: int
    rows: slice
    total: int

    def _key(self, purpose: str) -> np.random.SeedSequence:
        parts = [self.seed, self.epoch, self.step, zlib.crc32(purpose.encode())]
        return np.random.SeedSequence([int(value) % 2**64 for value in parts])

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for what a step draws once; the same on every rank, another for each purpose."""
        # PyTorch's Mersenne Twister is seeded with the low 32 bits, so that is what the hash has to fill.
        return torch.Generator().manual_seed(int(self._key(purpose).generate_state(1, np.uint32)[0]))

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        """(B, *shape) uniform fp32 numbers in [0, 1) for the rows, on the CPU; the work is that of B rows."""
        each = math.prod(shape)
        first, skipped = divmod(self.rows.start * each, PER_COUNT)
        key = self._key(purpose).generate_state(2, np.uint64)  # Philox's key has 128 bits
        random = np.random.Generator(np.random.Philox(key=key, counter=first))
        count = (self.rows.stop - self.rows.start) * each
        numbers = random.random(skipped + count, dtype=np.float32)[skipped:]
        return torch.from_numpy(numbers).view(-1, *shape)

    def slices(self) -> Iterator[tuple[slice, str]]:
        """Rows of the micro-batch, counted from its own first one, that lie in one slice of `SLICE` rows of the global
        batch; beside them the slice's name, to be part of a purpose.

        Example: rows 192 to 320 are (0 to 64, "slice 1") and (64 to 128, "slice 2").
        """
        start = self.rows.start
        while start < self.rows.stop:
            number = start // SLICE
            stop = min(self.rows.stop, (number + 1) * SLICE)
            yield slice(start - self.rows.start, stop - self.rows.start), f"slice {number}"
            start = stop

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
