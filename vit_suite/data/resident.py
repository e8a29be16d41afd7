"""Decode a whole set once into one uint8 tensor (N, C, H, W), when all images have one size and memory allows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vit_suite.data.decode import JPEG, DecodeError, image_size
from vit_suite.data.pixels import convert_channels
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.reading import MOST_THREADS, read, try_load
from vit_suite.data.source import ArraySource, FileSource, ImageSource, ResidentSource, Subset
from vit_suite.errors import UserError
from vit_suite.hardware import cores

GIB = 1024**3
PROBES = 64
"""Files whose headers are read to see whether all images have one size."""
SMALL = 128 * 128
"""Pixels below which threads do not help, except for JPEG; see `_threads`."""
BLOCK, AHEAD = 256, 512
"""Images that a thread decodes at a time, and that each thread may be ahead: small images come in large blocks."""
CONVERTED = 1024
"""Images of an array that are converted at a time: the gray conversion works in 32 bits."""


def common_size(source: ImageSource) -> tuple[int, int] | None:
    """(H, W) of every image if that is known, or if the headers of 64 files spread over the set agree; else None.

    Only the headers of a sample are read, so a set of a million photographs answers at once. `decode_all` finds the
    rare image of another size.
    """
    if source.image_size is not None:
        return source.image_size
    picks = sorted({int(i) for i in np.linspace(0, len(source) - 1, min(PROBES, len(source)))})
    sizes = {size for size in (_probe(source, i) for i in picks) if size is not None}
    return sizes.pop() if len(sizes) == 1 else None


def _probe(source: ImageSource, index: int) -> tuple[int, int] | None:
    while isinstance(source, Subset):
        index = int(source.indices[index])
        source = source.base
    if isinstance(source, FileSource) and (size := image_size(source.path(index), source.reading.frame)):
        return size
    image = try_load(source.load, index)
    return None if isinstance(image, DecodeError) else (image.shape[1], image.shape[2])


def make_resident(
    source: ImageSource, wanted: bool | str, memory_gb: float, quarantine: Quarantine
) -> ResidentSource | None:
    """The decoded set, or None when it stays in files. Images that do not decode are left out and reported to
    `quarantine`.

    `wanted`: True, False or "auto" (data.resident). UserError when True is impossible, or when too many files are bad.
    """
    if wanted is False:
        return None
    size = common_size(source)
    if size is None:
        _refuse(wanted, f"{source.title} holds images of different sizes")
        return None
    need = len(source) * source.channels * size[0] * size[1]
    if need > memory_gb * GIB:
        _refuse(wanted, f"{source.title} needs {need / GIB:.2f} GiB decoded, and data.memory_gb is {memory_gb}")
        return None
    decoded = decode_all(source, size)
    if decoded is None:
        _refuse(wanted, f"{source.title} holds images of different sizes")
        return None
    images, good, failures = decoded
    quarantine.report(failures, source.title, len(source))
    base = source if len(good) == len(source) else source.subset(good)
    return ResidentSource(base, images)


def _refuse(wanted: bool | str, why: str) -> None:
    if wanted is True:
        raise UserError(f"data.resident is true, but {why}; use data.resident auto or false.")


def decode_all(source: ImageSource, size: tuple[int, int]) -> tuple[Tensor, Tensor, list[DecodeError]] | None:
    """(images uint8 (M, C, H, W), their indices (M,) in the source, the failures); None if an image has another
    size."""
    if (whole := _array(source)) is not None:
        return whole, torch.arange(len(source)), []
    images = torch.empty((len(source), source.channels, *size), dtype=torch.uint8)
    bad: dict[int, DecodeError] = {}

    def fill(index: int, image: Tensor) -> bool:
        """Put an image in its place, in the thread that decoded it; returns whether it has the size of the others."""
        if image.shape[1:] != images.shape[2:]:
            return False
        images[index] = image
        return True

    threads = 0 if (count := _threads(source, size)) == 1 else count
    for index, fits in read(source, range(len(source)), workers=threads, ahead=AHEAD * threads, block=BLOCK, then=fill):
        if isinstance(fits, DecodeError):
            bad[index] = fits
        elif not fits:
            return None
    if not bad:
        return images, torch.arange(len(source)), []
    good = torch.tensor([i for i in range(len(source)) if i not in bad], dtype=torch.int64)
    return images[good], good, [bad[i] for i in sorted(bad)]


def _threads(source: ImageSource, size: tuple[int, int]) -> int:
    """How many threads decode. JPEG decoding releases Python's lock, so threads run side by side; other small images do
    not: through Pillow, at 32 px on 2 cores, two threads took twice as long as one.
    """
    large = size[0] * size[1] >= SMALL and not source.has_masks
    return min(MOST_THREADS, cores()) if large or source.path(0).lower().endswith(JPEG) else 1


def _array(source: ImageSource) -> Tensor | None:
    """All images of an array-backed source at once, converted; None for other sources."""
    base = source.base if isinstance(source, Subset) else source
    if not isinstance(base, ArraySource):
        return None
    picks = source.indices.numpy() if isinstance(source, Subset) else np.arange(len(source))
    images = torch.empty((len(source), source.channels, *base.images.shape[2:]), dtype=torch.uint8)
    for start in range(0, len(picks), CONVERTED):
        part = convert_channels(base.images[picks[start : start + CONVERTED]], source.channels, source.name)
        images[start : start + CONVERTED] = torch.from_numpy(np.array(part, order="C"))
    return images


def to_device(source: ResidentSource, device: torch.device | str, reserve: float = 0.5) -> bool:
    """Move the images of `source` to `device` in place; returns False, and moves nothing, if they do not fit.

    They fit a GPU if they need at most the share `reserve` of its free memory. The rest is for the model.
    """
    device = torch.device(device)
    if source.images.device == device:
        return True
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if source.images.numel() > reserve * free:
            return False
    source.images = source.images.to(device)
    return True
