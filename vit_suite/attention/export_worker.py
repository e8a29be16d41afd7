"""From a block of images to their files: decode, look, draw, write. A block runs in one thread, several blocks at once.

Axes: B images, C channels, H x W pixels of a file, gh x gw patches, h heads, T tokens.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vit_suite import distributed
from vit_suite.attention import grids, pca
from vit_suite.attention.drawing import Drawing, Seen
from vit_suite.attention.export_options import MAPS, ExportOptions
from vit_suite.attention.formats import attentive, draw
from vit_suite.attention.grids import attention_bytes, in_batches, view_of, view_size
from vit_suite.attention.maps import Look, artifacts, look, max_map, mean_map, without_artifacts
from vit_suite.attention.pca import Basis, basis_of
from vit_suite.data.decode import DecodeError
from vit_suite.data.inputs import Pictures
from vit_suite.data.reading import read
from vit_suite.hardware import autocast, pick_precision
from vit_suite.views.multicrop import normalize_

WAITING_BYTES = 64 * 2**20
"""Limit of the decoded pictures of a block that wait for others of their grid. Above it the fullest group runs as it
is."""
AT_ONCE_BYTES = 4 * grids.ATTENTION_BYTES
"""Limit of the attention matrices of all batches that run at a time."""
BASIS_BLOCK = 16
"""Sampled images that a rank looks at together for the basis of a folder."""
COARSE = 16
"""An image of fewer patches shows little, and the summary says so."""
QUEUED = 4
"""Blocks for each thread that are waiting or running; more would hold their records in memory for nothing."""
NO_LIMIT = 2**62
"""Stands for `max_tokens` where nothing is to be shrunk."""


@dataclass
class _Job:
    """One decoded image on its way."""

    index: int
    picture: np.ndarray
    """uint8 (C, H, W), as decoded."""
    view: Tensor
    """uint8 (C, gh * patch, gw * patch), what the backbone sees before normalization."""

    @property
    def bytes(self) -> int:
        return self.picture.nbytes


class Worker:
    """Exports blocks of pictures.

    `seconds` is the time of all threads together, `model_seconds` the part of it that the forward pass took.
    """

    def __init__(
        self,
        backbone: Any,
        drawing: Drawing,
        pictures: Pictures,
        options: ExportOptions,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.backbone, self.drawing, self.pictures, self.options = backbone, drawing, pictures, options
        self.mean, self.std, self.clip = mean, std, options.clip_artifacts
        self.device = device_of(backbone)
        self.precision = pick_precision(options.precision, self.device)
        self.attentive = attentive(drawing.formats)
        self.rollout = self.attentive and "rollout" in drawing.maps
        self.basis: Basis | None = None
        """Of the folder, once `find_basis` has run."""
        self.budget = _Budget(AT_ONCE_BYTES if self.device.type == "cpu" else 0)
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.seconds = self.model_seconds = 0.0

    def find_basis(self) -> None:
        """Compute the principal components of the folder, from up to `pca.IMAGES` images.

        Ranks share these images. The list of images alone decides what is computed together, so all ranks get the same
        basis, on any number of ranks.
        """
        count = min(pca.IMAGES, len(self.pictures))
        chosen = [number * len(self.pictures) // count for number in range(count)]
        each = max(1, pca.PATCHES // count)

        def patches_of(numbers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
            with torch.no_grad():
                return [
                    pca.sampled(patches, each)
                    for batch in self._batches(numbers, [], quiet=True)
                    for patches in self._patches(self._look(batch))
                ]

        started = time.perf_counter()
        blocks = [chosen[start : start + BASIS_BLOCK] for start in range(0, count, BASIS_BLOCK)]
        found = [pair for part in distributed.map_over_ranks(patches_of, blocks) for pair in part]
        if found:
            patches, border = (torch.cat(column) for column in zip(*found, strict=True))
            self.basis = basis_of(patches, border, self.options.pca_foreground)
        self.seconds += time.perf_counter() - started

    def run(self, blocks: Sequence[range], threads: int, bar: Any) -> Iterator[list[str]]:
        """The records of each block, one JSON line for each image. An error of a thread is raised here."""
        self.bar = bar
        pending: deque[Future] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="attention")
        try:
            for block in blocks:
                pending.append(pool.submit(self.block, block))
                if len(pending) > QUEUED * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)

    def block(self, indices: range) -> list[str]:
        """Write the files of these pictures; returns their records, in any order."""
        started = time.perf_counter()
        records: list[dict[str, Any]] = []
        with torch.no_grad():  # each thread has its own switch
            for batch in self._batches(indices, records):
                if self.stopped.is_set():
                    break
                for job, seen in zip(batch, self._maps(batch), strict=True):
                    records.append(self._record(job, seen) | draw(seen, self.pictures.names[job.index]))
                self._count(len(batch))
        with self.lock:
            self.seconds += time.perf_counter() - started
        return [json.dumps(record) + "\n" for record in records]

    def _count(self, images: int) -> None:
        with self.lock:
            self.bar.update(images)

    def _record(self, job: _Job, seen: Seen) -> dict[str, Any]:
        height, width = seen.size
        rows, columns = self.backbone.grid_of(job.view)
        unlimited = view_size(seen.size, self.backbone.patch, self.options.image_size, NO_LIMIT)
        counts = {
            "shrunk": int(tuple(job.view.shape[1:]) != unlimited),
            "coarse": int(rows * columns < COARSE),
            "reduced": int(self.drawing.drawn_size(seen.size) != seen.size),
            "artifacts": int(seen.extra["artifacts"].sum()) if seen.extra else 0,
        }
        return {"index": job.index, "height": height, "width": width, **counts}

    def _batches(
        self, indices: Sequence[int], records: list[dict[str, Any]], quiet: bool = False
    ) -> Iterator[list[_Job]]:
        """Jobs of these pictures in batches of one grid; files that do not decode go to `records`."""

        def most(size: tuple[int, int]) -> int:
            return min(self.options.batch_size, grids.ATTENTION_BYTES // self._bytes(size))

        return in_batches(self._jobs(indices, records, quiet), most, WAITING_BYTES)

    def _jobs(self, indices: Sequence[int], records: list[dict[str, Any]], quiet: bool) -> Iterator[_Job]:
        for index, job in read(self.pictures.source, indices, workers=0, block=1, then=self._job):
            if isinstance(job, DecodeError):
                records.append({"index": index, "path": job.path, "error": job.reason})
                if not quiet:
                    self._count(1)
            else:
                yield job

    def _job(self, index: int, image: Tensor) -> _Job:
        picture = np.array(image.numpy(), order="C")
        view = view_of(torch.from_numpy(picture), self.backbone.patch, self.options.image_size, self.options.max_tokens)
        return _Job(index, picture, view)

    def _bytes(self, size: Sequence[int]) -> int:
        """Bytes of one image's attention matrices: those of a block, and with rollout the mean of every block's."""
        matrices = self.backbone.heads + (self.backbone.depth if self.rollout else 0)
        return attention_bytes(self.backbone, size, matrices)

    def _maps(self, batch: list[_Job]) -> Iterator[Seen]:
        """What the backbone sees in each picture of a batch."""
        looked = self._look(batch)
        heads, small = looked.heads, looked.heads
        found = None
        if self.attentive:
            rollout = looked.rollout
            if looked.norms is not None and self.clip is not None:
                found = artifacts(looked.norms, self.clip)
                heads = without_artifacts(heads, found)
                rollout = None if rollout is None else without_artifacts(rollout, found)
            small = torch.cat([self._kind(kind, heads, rollout) for kind in MAPS if kind in self.drawing.maps], dim=1)
        patches = self._patches(looked) if "pca" in self.drawing.formats else None
        for i, job in enumerate(batch):
            seen = Seen(self.drawing, self.pictures.path(job.index), job.picture, heads[i], small[i])
            if found is not None:
                seen.extra = {"artifacts": found[i].numpy()}
            if patches is not None:
                seen.colors, seen.front = self._components(patches[i])
            yield seen

    def _kind(self, kind: str, heads: Tensor, rollout: Tensor | None) -> Tensor:
        """(B, n, gh, gw) of one kind of map."""
        if kind == "heads":
            return heads
        if kind == "rollout":
            assert rollout is not None
            return rollout[:, None]
        return (mean_map if kind == "mean" else max_map)(heads)[:, None]

    def _patches(self, looked: Look) -> Tensor:
        """(B, gh, gw, D)."""
        assert looked.patches is not None
        return looked.patches

    def _components(self, patches: Tensor) -> tuple[Tensor, Tensor | None]:
        """(colors (3, gh, gw), foreground (gh, gw) or None) of the patches (gh, gw, D) of a picture."""
        basis = self.basis
        if basis is None:
            flat, border = pca.sampled(patches, patches.shape[0] * patches.shape[1])
            basis = basis_of(flat, border, self.options.pca_foreground)
        return basis.colors(patches), basis.foreground(patches)

    def _look(self, batch: list[_Job]) -> Look:
        """One forward pass; its results are on the CPU."""
        views = torch.stack([job.view for job in batch])
        features = "pca" in self.drawing.formats
        with self.budget.take(len(batch) * self._bytes(views.shape[-2:])):
            started = time.perf_counter()
            images = normalize_(views.to(self.device).float().div_(255), self.mean, self.std)
            with autocast(self.precision, self.device):
                if self.attentive:
                    looked = look(self.backbone, images, self.rollout, self.clip is not None, features)
                else:
                    tokens = self.backbone.tokens(images)
                    patches = tokens.patches.float().unflatten(1, tokens.grid)
                    looked = Look(patches.new_zeros(len(patches), 0, *tokens.grid), patches=patches)
            looked = Look(looked.heads.cpu(), *(None if part is None else part.cpu() for part in looked[1:]))
            with self.lock:
                self.model_seconds += time.perf_counter() - started
        return looked


def device_of(backbone: Any) -> torch.device:
    """Where the backbone's parameters are."""
    first = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    return first.device if first is not None else torch.device("cpu")


class _Budget:
    """Limits the bytes that threads take at a time. A thread that is alone may take any number, so with a limit of 0
    there is one at a time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken, self.changed = limit, 0, threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + count <= self.limit)
            self.taken += count
        try:
            yield
        finally:
            with self.changed:
                self.taken -= count
                self.changed.notify_all()
