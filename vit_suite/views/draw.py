"""Which random numbers a micro-batch takes, on the CPU.

Every number belongs to a place: seed, epoch, optimizer step, purpose, and row of the GLOBAL batch of the step. So the
views, corruptions, mixtures and dropped paths are the same on 1 rank and on N, with accumulation, and after a resume.
The numbers come from Philox, a generator that counts (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
3"): a rank starts its counter at its first row and draws no number of another rank's rows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

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
    """The place of a micro-batch: rows `rows` of the `total` images of optimizer step `step` of an epoch.

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
        """A CPU generator for numbers that a step draws once; the same on every rank, another for each purpose."""
        # PyTorch seeds its Mersenne Twister with 32 bits.
        return torch.Generator().manual_seed(int(self._key(purpose).generate_state(1, np.uint32)[0]))

    def uniform(self, *shape: int, purpose: str) -> Tensor:
        """(B, *shape) uniform fp32 numbers in [0, 1) for the B rows, on the CPU. Other rows cost nothing."""
        each = math.prod(shape)
        first, skipped = divmod(self.rows.start * each, PER_COUNT)
        key = self._key(purpose).generate_state(2, np.uint64)  # Philox's key has 128 bits
        random = np.random.Generator(np.random.Philox(key=key, counter=first))
        count = (self.rows.stop - self.rows.start) * each
        numbers = random.random(skipped + count, dtype=np.float32)[skipped:]
        return torch.from_numpy(numbers).view(-1, *shape)

    def slices(self) -> Iterator[tuple[slice, str]]:
        """Rows of the micro-batch, counted from its first one, that lie in one slice of `SLICE` rows of the global
        batch, and the name of that slice, for a purpose.

        Example: rows 192 to 320 are (0 to 64, "slice 1") and (64 to 128, "slice 2").
        """
        start = self.rows.start
        while start < self.rows.stop:
            number = start // SLICE
            stop = min(self.rows.stop, (number + 1) * SLICE)
            yield slice(start - self.rows.start, stop - self.rows.start), f"slice {number}"
            start = stop

    def partners(self, device: torch.device | str = "cpu") -> Tensor:
        """(B,) the partner of each row of the micro-batch: the other row of its pair, or the next row if B is odd.

        The order of an epoch is random, so a neighbour is a random other image. Pairs never straddle ranks: any number
        of ranks makes the same pairs, if each rank has an even number of rows. A single row is its own partner.
        """
        count = self.rows.stop - self.rows.start
        index = torch.arange(count, device=device)
        return index ^ 1 if count % 2 == 0 else (index + 1) % count


@dataclass
class ViewParameters:
    """Everything random about the views of a batch; tensors on the CPU, first axes (B, V)."""

    boxes: Tensor
    """(B, V, 4) int64 top, left, height, width in pixels."""
    flip: Tensor
    """(B, V) bool."""
    jitter: Tensor
    """(B, V) bool."""
    factors: Tensor
    """(B, V, 4) brightness, contrast, saturation factors, hue shift in turns."""
    order: Tensor
    """(B, V, 4) int64 order of those four operations."""
    gray: Tensor
    """(B, V) bool."""
    blur: Tensor
    """(B, V) bool."""
    sigma: Tensor
    """(B, V) standard deviation of the blur in pixels of the view."""
    solarize: Tensor
    """(B, V) bool."""

    def views(self, part: slice) -> ViewParameters:
        """The parameters of some views. First axis V * B (view by view); boxes and flip stay (B, V)."""
        chosen = {field.name: getattr(self, field.name)[:, part] for field in fields(self)}
        return ViewParameters(
            **{
                key: value if key in ("boxes", "flip") else value.transpose(0, 1).flatten(0, 1)
                for key, value in chosen.items()
            }
        )

    @staticmethod
    def joined(parts: Sequence[ViewParameters]) -> ViewParameters:
        """Several results of `views` in one: first axis the sum of V * B; boxes and flips (B, sum of V)."""
        return ViewParameters(
            **{
                field.name: torch.cat(
                    [getattr(part, field.name) for part in parts], 1 if field.name in ("boxes", "flip") else 0
                )
                for field in fields(ViewParameters)
            }
        )


def alone(count: int, seed: int = 0, epoch: int = 0, step: int = 0) -> Draw:
    """The draw of a batch of `count` images that is a whole step."""
    return Draw(seed, epoch, step, slice(0, count), count)
