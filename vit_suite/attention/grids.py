"""The size at which the backbone sees an image, and which images share a forward pass.

Images of one patch grid share a pass. The last bits of a matrix product depend on the batch. So the list of images
alone decides which images form a batch, and results are the same on any number of ranks and threads.

Axes: C channels, H x W pixels, gh x gw patches, h heads, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.nn import functional

from vit_suite.config.limits import pair

ATTENTION_BYTES = 256 * 2**20
"""Limit of the attention matrices (B, h, T, T) in float32 of a pass: T = 4096 takes 64 MiB for each head and image. A
single image may exceed it."""
BLOCKS = 32
"""Smallest number of blocks of whole batches, so that all ranks and threads have work."""
LEAST = 8
"""Smallest number of blocks of a small set, where a block is then a part of a batch."""
BATCHES = 4
"""Largest number of batches in a block. With more, more images of one grid would meet, but more pictures would wait."""


class Waiting(Protocol):
    """A decoded image that waits for others of its grid."""

    @property
    def view(self) -> Tensor:
        """uint8 (C, gh * patch, gw * patch), what the backbone sees before normalization."""

    @property
    def bytes(self) -> int:
        """Memory that it holds while it waits."""


Job = TypeVar("Job", bound=Waiting)


def cut(images: int, batch_size: int) -> list[range]:
    """Blocks of neighboring images, as numbers. A block holds up to `BATCHES` batches; one batch, when there would be
    fewer than `BLOCKS` blocks; part of a batch, when there would be fewer than `LEAST`."""
    size = batch_size * min(BATCHES, images // (BLOCKS * batch_size)) or min(batch_size, -(-images // LEAST))
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def view_size(
    size: Sequence[int], patch: int | tuple[int, int], shorter: int | None, max_tokens: int
) -> tuple[int, int]:
    """(height, width) in pixels at which the backbone sees an image of `size`: multiples of `patch`, with at most
    `max_tokens` patches.

    shorter: length in pixels of the shorter side; the image's own when None.
    """
    height: float = size[0]
    width: float = size[1]
    if shorter is not None:
        factor = shorter / min(height, width)
        height, width = height * factor, width * factor
    patch_rows, patch_columns = pair(patch)
    rows, columns = max(1, int(height / patch_rows + 0.5)), max(1, int(width / patch_columns + 0.5))
    if rows * columns > max_tokens:
        factor = (max_tokens / (rows * columns)) ** 0.5
        rows = max(1, min(max_tokens, int(rows * factor)))
        columns = max(1, min(int(columns * factor), max_tokens // rows))
    return rows * patch_rows, columns * patch_columns


def view_of(image: Tensor, patch: int | tuple[int, int], shorter: int | None, max_tokens: int) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, h, w) at its `view_size`; the image itself where it has that size."""
    size = view_size(image.shape[1:], patch, shorter, max_tokens)
    if tuple(image.shape[1:]) == size:
        return image
    return functional.interpolate(image[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]


def attention_bytes(backbone: Any, size: Sequence[int], matrices: int) -> int:
    """Bytes of `matrices` attention matrices (T, T) in float32, of one image of `size` (H, W) in pixels."""
    tokens = backbone.prefix_tokens + size[0] * size[1] // math.prod(backbone.patch)
    return 4 * tokens**2 * matrices


def in_batches(jobs: Iterable[Job], most: Callable[[tuple[int, int]], int], waiting_bytes: int) -> Iterator[list[Job]]:
    """Jobs grouped by the size of their view. A group has at most `most(size)` jobs, and at least one.

    A group is yielded as soon as it is full. When more than `waiting_bytes` wait, the largest group is yielded. The
    other groups follow at the end.
    """
    waiting: dict[tuple[int, int], list[Job]] = {}
    held = 0
    for job in jobs:
        size = (job.view.shape[-2], job.view.shape[-1])
        waiting.setdefault(size, []).append(job)
        held += job.bytes
        full = len(waiting[size]) >= max(1, most(size))
        if full or held > waiting_bytes:
            batch = waiting.pop(size if full else max(waiting, key=lambda key: len(waiting[key])))
            held -= sum(one.bytes for one in batch)
            yield batch
    yield from waiting.values()
