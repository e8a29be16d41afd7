"""Which images make up batch b of epoch e on rank r: one global order an epoch, sliced.

The global batch s of epoch e is `order(seed, e)[s * G : (s + 1) * G]`, where the order is a permutation of all images,
or of a few tar files at a time (`shard_order`). A batch splits into `accumulate` micro-batches, and each of these into
one contiguous part a rank, so that any number of ranks and of micro-batches sees the same global batches.

With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335) a global batch has `repeats` copies of an image, each
with views of its own. As in facebookresearch/deit samplers.py `RASampler`, an epoch has as many rows as without copies,
so it sees 1 of `repeats` images. Deviation: DeiT deals the copies out to ranks in turn; here all first copies of a
global batch come first, then all second ones, so that the order does not depend on the number of ranks, and neighbours
(`Draw.partners`) are different images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vit_suite.data.source import stable_seed
from vit_suite.errors import UserError, counted


class Batch(NamedTuple):
    """One micro-batch of one rank. `rows`: its place in the global batch; `indices`: int64 (B,) into the source."""

    epoch: int
    step: int
    micro: int
    rows: slice
    indices: Tensor


def epoch_order(total: int, seed: int, epoch: int) -> Tensor:
    """The permutation (total,) of an epoch; a function of its arguments alone."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(stable_seed("order", seed, epoch)))


def shard_order(shards: Tensor, window: int, seed: int, epoch: int) -> Tensor:
    """An order (total,) that reads every shard in one stretch: the shards are shuffled, and the images of each `window`
    of them.

    `shards`: int64 (total,), the shard of each image. A function of its arguments alone; a window of all shards is
    `epoch_order`.
    """
    count = int(shards.max()) + 1
    generator = torch.Generator().manual_seed(stable_seed("shards", seed, epoch))
    place = torch.randperm(count, generator=generator)  # (shards,): the place of each shard in the epoch
    mixed = epoch_order(len(shards), seed, epoch)
    return mixed[torch.argsort(place[shards[mixed]] // window, stable=True)]


FEW_STEPS = 20
"""Optimizer steps an epoch below which an epoch hardly moves the weights."""
LEAST_BATCH = 8
"""Images below which a batch is small for any set."""


def fitting_batch(images: int) -> int:
    """The largest power of 2 with which an epoch of so many images has `FEW_STEPS` steps, and `LEAST_BATCH` at least.

    450 images: 16, which makes 28 steps. A set of fewer images than `LEAST_BATCH` is one batch.
    """
    return min(images, max(LEAST_BATCH, 2 ** int(math.log2(max(1, images // FEW_STEPS)))))


@dataclass(frozen=True)
class EpochPlan:
    """Slices of an epoch. `batch_size` is global; incomplete global batches are dropped.

    `shards`, the shard of each image, and `window` choose `shard_order`; window 0 is `epoch_order`. `repeats`: copies
    of an image in a global batch.

    Raises UserError when the batch exceeds the set, does not split evenly over ranks and micro-batches, or has fewer
    rows than an image has copies.
    """

    total: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    window: int = 0
    shards: Tensor | None = field(default=None, repr=False, compare=False)
    repeats: int = 1

    def __post_init__(self) -> None:
        parts = self.world * self.accumulate
        if self.batch_size < 1:
            raise UserError(f"data.batch_size is {self.batch_size}; expected at least 1.")
        if self.batch_size > self.total:
            better = fitting_batch(self.total)
            mend = (
                f" Try data.batch_size {better}: {counted(self.total // better, 'step')} an epoch."
                if self.total
                else ""
            )
            raise UserError(
                f"data.batch_size {self.batch_size} is larger than the data set of"
                f" {counted(self.total, 'training image')}.{mend}"
            )
        if self.batch_size % parts:
            below, above = self.batch_size // parts * parts, -(-self.batch_size // parts) * parts
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"data.batch_size {self.batch_size} (global) does not split evenly over {self.world} ranks x"
                f" {self.accumulate} accumulated micro-batches; {near} would."
            )
        if self.repeats > self.batch_size:
            raise UserError(f"data.repeats {self.repeats} is more than data.batch_size {self.batch_size}.")

    @property
    def local(self) -> int:
        """Images in a micro-batch of one rank."""
        return self.batch_size // (self.world * self.accumulate)

    def __len__(self) -> int:
        """Micro-batches in an epoch."""
        return self.total // self.batch_size * self.accumulate

    def rows(self, micro: int) -> slice:
        """Place of micro-batch `micro` of this rank in its global batch."""
        start = (micro * self.world + self.rank) * self.local
        return slice(start, start + self.local)

    def order(self, epoch: int) -> Tensor:
        """Indices (total,) of all images as this epoch reads them, the same on every rank."""
        if self.window and self.shards is not None:
            return shard_order(self.shards, self.window, self.seed, epoch)
        return epoch_order(self.total, self.seed, epoch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's micro-batches of an epoch, from number `start` on."""
        order = self.order(epoch)
        # Which row of the epoch, counted with copies side by side, is at each place of a global batch.
        copies = torch.cat([torch.arange(first, self.batch_size, self.repeats) for first in range(self.repeats)])
        for number in range(start, len(self)):
            step, micro = divmod(number, self.accumulate)
            rows = self.rows(micro)
            # A slice of the order would keep all of it, and take it along to the worker that decodes the batch.
            indices = order[(step * self.batch_size + copies[rows]) // self.repeats]
            yield Batch(epoch, step, micro, rows, indices)


class EpochLoader:
    """Iterates an `EpochPlan`; subclasses turn plans into batches.

    Iterating again goes on to the next epoch; `set_epoch` chooses one. `state_dict` holds the position after the last
    batch that was handed out, not after those that workers have prepared; `load_state_dict` makes the next iteration go
    on from there. The state does not depend on the rank, and a resumed run may have another number of ranks; of
    micro-batches only from the start of an epoch, because Lightning counts those. Lightning calls all three.
    """

    def __init__(self, plan: EpochPlan) -> None:
        self.plan = plan
        self.batch_size = plan.local  # images of a batch of this rank; Lightning reads this name
        self.epoch = 0
        self.position = 0  # micro-batches of the epoch already handed out
        self._placed = True  # epoch and position are where the next iteration starts

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def sampler(self) -> EpochLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at `epoch`; a position just loaded for that epoch is kept."""
        if not (self._placed and epoch == self.epoch):
            self.epoch, self.position, self._placed = epoch, 0, True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: epoch, global batches done, micro-batches done of the next, and what must not change."""
        step, micro = divmod(self.position, self.plan.accumulate)
        fixed = {
            "total": self.plan.total,
            "batch_size": self.plan.batch_size,
            "seed": self.plan.seed,
            "window": self.plan.window,
            "repeats": self.plan.repeats,
        }
        return {"epoch": self.epoch, "step": step, "micro": micro, "accumulate": self.plan.accumulate} | fixed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that `state` counts. UserError when the order it counts in was another."""
        names = {
            "total": "number of training images",
            "batch_size": "data.batch_size",
            "seed": "run.seed",
            "repeats": "data.repeats",
            "window": "data.shard_window (0 for data.order shuffle)",
        }
        for key, name in names.items():
            before, now = state[key], getattr(self.plan, key)
            if before != now:
                raise UserError(f"cannot resume: the run began with {name} {before}, now it is {now}.")
        self.epoch, self.position, self._placed = (
            state["epoch"],
            state["step"] * self.plan.accumulate + state["micro"],
            True,
        )
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        if self.position and state["accumulate"] != self.plan.accumulate:
            change = f"{state['accumulate']} before, {self.plan.accumulate} now"
            raise UserError(
                f"cannot resume within an epoch with another trainer.accumulate ({change}): go on with the first to its"
                " end."
            )

    def __iter__(self) -> Iterator[Any]:
        # A generator: the position does not move before the first batch is asked for. Lightning makes iterators that it
        # never uses.
        if not self._placed:
            self.epoch, self.position = self.epoch + 1, 0
        self._placed = False
        for batch in self._produce(self.epoch, self.position):
            self.position += 1
            yield batch

    def _produce(self, epoch: int, start: int) -> Iterator[Any]:
        raise NotImplementedError
