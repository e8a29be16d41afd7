"""Where images come from: files, arrays, a tensor in memory, or a generator, all behind one small class.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vit_suite.data.decode import DecodeError, decode
from vit_suite.data.pixels import READING, Reading, convert_channels
from vit_suite.data.quarantine import Quarantine

__all__ = ["ArraySource", "FileSource", "ImageSource", "ResidentSource", "Subset", "stable_seed", "stratified"]


class ImageSource:
    """Un-augmented images of one split, by index.

    name: as shown beside scores, e.g. "CIFAR-10 (JPEG)". split: e.g. "train". classes: names, empty when unlabeled.
    labels: int64 (N,), -1 for an image without one; None when the whole set has none.
    boxes: float32 (N, 4) of x0, y0, x1, y1 in pixels, x1 and y1 exclusive; None when the set has none.
    channels: C. image_size: (H, W) when every image is known to have it, else None. has_masks: whether `mask` works.
    shards: int64 (N,), the number of the tar file that holds an image; None where images lie in files of their own.
    quarantine: where `get` reports; set by the data module.
    failures: what could not even be listed (a folder without permission).
    reading: how files are read (`data.value_range`, `data.max_pixels`, `data.frame`); set by whoever opens the set.
    """

    name: str
    split: str
    classes: list[str]
    labels: Tensor | None
    boxes: Tensor | None = None
    channels: int = 3
    image_size: tuple[int, int] | None = None
    has_masks: bool = False
    shards: Tensor | None = None
    quarantine: Quarantine | None = None
    reading: Reading = READING
    failures: Sequence[DecodeError] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> Tensor:
        """Image `index` as uint8 (C, H, W). DecodeError when its file holds none."""
        raise NotImplementedError

    def path(self, index: int) -> str:
        """The file of image `index`, or `name[index]` where there is no file."""
        return f"{self.name} {self.split}[{index}]"

    def content(self, index: int) -> bytes | None:
        """The bytes of that file; None if there is no file, or if it cannot be read."""
        return None

    def mask(self, index: int) -> Tensor:
        """The object of image `index` as bool (H, W), where `has_masks`."""
        raise NotImplementedError(f"{self.name} has no masks")

    def label(self, index: int) -> int:
        """Label of image `index`, -1 without one."""
        return -1 if self.labels is None else int(self.labels[index])

    def get(self, index: int) -> Tensor | None:
        """`load`, or None when the file does not decode: then it is reported to the quarantine (UserError beyond its
        limit)."""
        try:
            return self.load(index)
        except DecodeError as error:
            quarantine = self.quarantine if self.quarantine is not None else Quarantine()
            quarantine.report([error], self.title, len(self))
            return None

    @property
    def title(self) -> str:
        """Name and split, as messages show them."""
        return f"{self.name} {self.split}".strip()

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSource:
        """The images at `indices`, in that order."""
        return Subset(self, indices)

    def _describe(self, other: ImageSource) -> None:
        """Copy from `other` what holds for any part of it."""
        self.name, self.split, self.classes, self.channels = other.name, other.split, other.classes, other.channels
        self.image_size, self.has_masks, self.quarantine = other.image_size, other.has_masks, other.quarantine
        self.reading, self.failures = other.reading, other.failures


class Subset(ImageSource):
    """Chosen images of another source, renumbered from 0; `indices` (M,) maps back."""

    def __init__(self, base: ImageSource, indices: Sequence[int] | Tensor) -> None:
        self._describe(base)
        self.base, self.indices = base, torch.as_tensor(indices, dtype=torch.int64)
        self.labels = None if base.labels is None else base.labels[self.indices]
        self.boxes = None if base.boxes is None else base.boxes[self.indices]
        self.shards = None if base.shards is None else base.shards[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Tensor:
        return self.base.load(int(self.indices[index]))

    def path(self, index: int) -> str:
        return self.base.path(int(self.indices[index]))

    def content(self, index: int) -> bytes | None:
        return self.base.content(int(self.indices[index]))

    def mask(self, index: int) -> Tensor:
        return self.base.mask(int(self.indices[index]))


class FileSource(ImageSource):
    """Image files. All paths are one byte array, which workers share: a list of a million strings would be copied into
    each of them."""

    def __init__(
        self,
        name: str,
        split: str,
        root: str | os.PathLike,
        paths: Sequence[str],
        channels: int,
        classes: Sequence[str] = (),
        labels: Sequence[int] | Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> None:
        self.name, self.split, self.channels, self.classes = name, split, channels, list(classes)
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        self.boxes = boxes
        self.root = os.fspath(root)
        longest = max(1, max((len(os.fsencode(path)) for path in paths), default=1))
        names = (os.fsencode(path) for path in paths)  # not a second list of millions of objects
        self.paths = np.fromiter(names, dtype=f"S{longest}", count=len(paths))  # relative to root, or absolute

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Tensor:
        pixels = decode(self.path(index), self.channels, None, self.reading)
        return torch.from_numpy(writable(pixels))

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def content(self, index: int) -> bytes | None:
        path = self.path(index)
        if not os.path.isfile(path):  # opening a pipe would wait for a writer
            return None
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError:
            return None


class ArraySource(ImageSource):
    """Images of a uint8 array (N, C, H, W) in memory; each is converted to `channels` when it is loaded."""

    def __init__(
        self,
        name: str,
        split: str,
        images: np.ndarray,
        channels: int,
        classes: Sequence[str],
        labels: Sequence[int] | np.ndarray | None,
    ) -> None:
        self.name, self.split, self.channels, self.classes = name, split, channels, list(classes)
        self.images, self.image_size = images, (images.shape[2], images.shape[3])
        self.labels = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(convert_channels(self.images[index], self.channels, self.name), order="C"))


class ResidentSource(ImageSource):
    """Decoded images in one tensor: `images` uint8 (N, C, H, W), on the CPU or a GPU; masks and paths come from
    `base`."""

    def __init__(self, base: ImageSource, images: Tensor) -> None:
        self._describe(base)
        self.base, self.images = base, images
        self.labels, self.boxes, self.shards = base.labels, base.boxes, base.shards
        self.image_size = (images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return self.images[index]

    def path(self, index: int) -> str:
        return self.base.path(index)

    def mask(self, index: int) -> Tensor:
        return self.base.mask(index)

    def subset(self, indices: Sequence[int] | Tensor) -> ResidentSource:
        """The images at `indices`, copied into one tensor of their own on the same device."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        part = ResidentSource(Subset(self.base, indices), self.images[indices.to(self.images.device)])
        part.quarantine = self.quarantine
        return part


def writable(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it where torch could not use it as it is (read-only, or not contiguous)."""
    return array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words: the same on every machine; neighbouring numbers give unrelated seeds."""
    text = "/".join(map(str, parts)).encode()
    return (zlib.crc32(text) << 31) ^ zlib.crc32(text[::-1] + b"vit-suite")


def stratified(labels: Tensor | None, total: int, length: int | None, seed: int) -> Tensor:
    """Sorted indices (min(length, total),) of a sample that keeps the share of every class (largest remainders).

    Depends on the arguments alone. Without labels the sample is uniform. `length` None or at least `total` keeps all.
    """
    if length is None or length >= total:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(stable_seed("length", seed))
    order = torch.randperm(total, generator=generator)
    if labels is None:
        return order[:length].sort().values
    classes, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    quota = sizes.double() * length / total
    take = quota.floor().long()
    rest = torch.argsort(quota - take, descending=True, stable=True)[: length - int(take.sum())]
    take[rest] += 1
    shuffled = order[torch.argsort(members[order], stable=True)]  # grouped by class, in random order within one
    starts = sizes.cumsum(0) - sizes
    chosen = [shuffled[start : start + count] for start, count in zip(starts.tolist(), take.tolist(), strict=True)]
    return torch.cat(chosen).sort().values
