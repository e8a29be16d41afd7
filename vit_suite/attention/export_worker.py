"""From a block of images to their files: decode, look, draw, write, in one thread; blocks in threads beside each other.

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
from torch import Tensor

from vit_suite.attention import grids
from vit_suite.attention.export_draw import Drawing, draw
from vit_suite.attention.export_inputs import Pictures
from vit_suite.attention.grids import attention_bytes, in_batches, view_of, view_size
from vit_suite.attention.maps import artifacts, look, max_map, mean_map, without_artifacts
from vit_suite.data.decode import DecodeError
from vit_suite.data.reading import read
from vit_suite.hardware import autocast
from vit_suite.views.multicrop import normalize_

WAITING_BYTES = 64 * 2**20
"""Decoded pictures of a block that wait for others of their grid; beyond it the fullest group runs as it is."""
AT_ONCE_BYTES = 4 * grids.ATTENTION_BYTES
"""Limit of the attention matrices of all batches that run at a time."""
COARSE = 16
"""Fewer patches than these show little."""


@dataclass(frozen=True)
class Limits:
    """Of what the backbone sees at a time."""

    resize: int | None
    max_tokens: int
    batch_size: int


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
    """Exports blocks of pictures; `model_seconds` of `seconds` went into the forward pass, summed over threads."""

    def __init__(
        self,
        backbone: Any,
        drawing: Drawing,
        pictures: Pictures,
        limits: Limits,
        mean: Sequence[float],
        std: Sequence[float],
        clip: float | None,
        device: torch.device,
        precision: str,
    ) -> None:
        self.backbone, self.drawing, self.pictures, self.limits = backbone, drawing, pictures, limits
        self.mean, self.std, self.clip, self.device, self.precision = mean, std, clip, device, precision
        self.rollout = "rollout" in drawing.maps
        self.budget = _Budget(AT_ONCE_BYTES if device.type == "cpu" else 0)
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.seconds = self.model_seconds = 0.0

    def run(self, blocks: Sequence[range], threads: int, bar: Any) -> Iterator[list[str]]:
        """The records of each block, one JSON line an image; blocks run in `threads`, what one raises is raised
        here."""
        self.bar = bar
        pending: deque[Future] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="attention")
        try:
            for block in blocks:
                pending.append(pool.submit(self.block, block))
                if len(pending) > 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)

    def block(self, indices: range) -> list[str]:
        """Write the files of these pictures; their records, in no order."""
        started, records = time.perf_counter(), []
        with torch.no_grad():  # a thread has its own switch
            for batch in self._batches(indices, records):
                if self.stopped.is_set():
                    break
                for job, (heads, small, extra) in zip(batch, self._maps(batch), strict=True):
                    records.append(self._record(job, extra) | self._draw(job, heads, small, extra))
                self._count(len(batch))
        with self.lock:
            self.seconds += time.perf_counter() - started
        return [json.dumps(record) + "\n" for record in records]

    def _count(self, images: int) -> None:
        with self.lock:
            self.bar.update(images)

    def _draw(self, job: _Job, heads: Tensor, small: Tensor, extra: dict[str, Any]) -> dict[str, Any]:
        return draw(
            self.drawing,
            self.pictures.names[job.index],
            self.pictures.path(job.index),
            job.picture,
            heads,
            small,
            extra,
        )

    def _record(self, job: _Job, extra: dict[str, Any]) -> dict[str, Any]:
        height, width = job.picture.shape[1:]
        rows, columns = (side // self.backbone.patch_size for side in job.view.shape[1:])
        shrunk = tuple(job.view.shape[1:]) != view_size(
            (height, width), self.backbone.patch_size, self.limits.resize, 2**62
        )
        found = int(extra["artifacts"].sum()) if extra else 0
        counts = {"shrunk": int(shrunk), "coarse": int(rows * columns < COARSE), "artifacts": found}
        return {"index": job.index, "height": height, "width": width, **counts}

    def _batches(self, indices: range, records: list[dict]) -> Iterator[list[_Job]]:
        """Jobs of these pictures in batches of one grid; files that do not decode go to `records`."""

        def most(size: tuple[int, int]) -> int:
            return min(self.limits.batch_size, grids.ATTENTION_BYTES // self._bytes(size))

        return in_batches(self._jobs(indices, records), most, WAITING_BYTES)

    def _jobs(self, indices: range, records: list[dict]) -> Iterator[_Job]:
        for index, job in read(self.pictures.source, indices, workers=0, block=1, then=self._job):
            if isinstance(job, DecodeError):
                records.append({"index": index, "path": job.path, "error": job.reason})
                self._count(1)
            else:
                yield job

    def _job(self, index: int, image: Tensor) -> _Job:
        picture = np.array(image.numpy(), order="C")
        view = view_of(torch.from_numpy(picture), self.backbone.patch_size, self.limits.resize, self.limits.max_tokens)
        return _Job(index, picture, view)

    def _bytes(self, size: Sequence[int]) -> int:
        """Of one image's attention matrices: a block's, and with rollout the mean of each block's."""
        matrices = self.backbone.heads + (self.backbone.depth if self.rollout else 0)
        return attention_bytes(self.backbone, size, matrices)

    def _maps(self, batch: list[_Job]) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """For each job all heads (h, gh, gw), the maps that are drawn (n, gh, gw), and for the npz what was clipped."""
        looked = self._look(batch)
        heads, rollout, found = looked.heads, looked.rollout, None
        if self.clip is not None:
            found = artifacts(looked.norms, self.clip)
            heads = without_artifacts(heads, found)
            rollout = None if rollout is None else without_artifacts(rollout, found)
        kinds = {
            "heads": lambda: heads,
            "mean": lambda: mean_map(heads)[:, None],
            "max": lambda: max_map(heads)[:, None],
        }
        kinds["rollout"] = lambda: rollout[:, None]
        small = torch.cat([make() for kind, make in kinds.items() if kind in self.drawing.maps], dim=1)
        for i in range(len(batch)):
            yield heads[i], small[i], {} if found is None else {"artifacts": found[i].numpy()}

    def _look(self, batch: list[_Job]):
        """One forward pass; its maps on the CPU."""
        views = torch.stack([job.view for job in batch])
        with self.budget.take(len(batch) * self._bytes(views.shape[-2:])):
            started = time.perf_counter()
            images = normalize_(views.to(self.device).float().div_(255), self.mean, self.std)
            with autocast(self.precision, self.device):
                looked = look(self.backbone, images, self.rollout, norms=self.clip is not None)
            looked = looked._make(None if part is None else part.cpu() for part in looked)
            with self.lock:
                self.model_seconds += time.perf_counter() - started
        return looked


class _Budget:
    """Bytes that threads may take at a time; one thread alone may take any number, so with a limit of 0 there is one at
    a time."""

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
