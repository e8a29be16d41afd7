"""Training batches `(images, labels, indices)` from memory or from files.

images: uint8 (B, C, H, W), or a list of uint8 (C, H_i, W_i) when sizes differ; labels: int64 (B,), -1 without one;
indices: int64 (B,) into the source. `order.py` decides which images are in a batch.

A file that does not decode is replaced by another image, drawn from (its index, attempt) alone: the batch keeps its
shape, and every run draws the same replacement. The main process reports such files to the quarantine.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vit_suite.data.decode import DecodeError
from vit_suite.data.gpu_decode import decode_jpegs, read_file
from vit_suite.data.order import Batch, EpochLoader, EpochPlan
from vit_suite.data.packed import Packed
from vit_suite.data.quarantine import Quarantine
from vit_suite.data.reading import try_load
from vit_suite.data.source import ImageSource, ResidentSource, stable_seed
from vit_suite.errors import UserError
from vit_suite.hardware import cores, send
from vit_suite.signals import outlive

Images = Tensor | list[Tensor]
MOST_WORKERS = 32
"""Most decoding processes of a rank by default; each keeps two batches ready in shared memory. A core decodes 690 JPEGs
of ImageNet's size a second, and the fastest training takes 15,278 images a second on an H100 (docs/scaling.md): 23
cores."""
ATTEMPTS = 20
"""Replacements that are tried for one image before the training stops."""
SHM = "/dev/shm"
SHM_ATTEMPTS, SHM_PAUSE = 40, 0.5
"""Attempts and seconds between two: a worker waits 20 s for room in shared memory."""


class ResidentLoader(EpochLoader):
    """Batches of a `ResidentSource`, gathered on the device that holds it: no workers, no copies between devices."""

    def __init__(self, source: ResidentSource, plan: EpochPlan) -> None:
        super().__init__(plan)
        self.source = source

    def _produce(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        device = self.source.images.device
        labels = _labels(self.source)
        for batch in self.plan.batches(epoch, start):
            indices = send(batch.indices, device)
            yield self.source.images.index_select(0, indices), send(labels[batch.indices], device), indices


class FileLoader(EpochLoader):
    """Batches decoded in worker processes (in this one with `workers` 0), kept alive between epochs.

    `transform(images, batch)`, when given, runs in the worker on the list of images of a micro-batch and its
    `order.Batch`, and its result takes the place of the images. With `decode_on` workers only read, and images are
    decoded on that device (gpu_decode.py).
    """

    def __init__(
        self,
        source: ImageSource,
        plan: EpochPlan,
        workers: int = 0,
        quarantine: Quarantine | None = None,
        pin_memory: bool = False,
        transform: Callable[[list[Tensor], Batch], Any] | None = None,
        decode_on: torch.device | None = None,
    ) -> None:
        super().__init__(plan)
        self.source, self.quarantine, self.decode_on = source, _quarantine(quarantine, source), decode_on
        self._batches = _Feed(plan)
        batches: Any = self._batches  # torch's types know lists of indices alone
        decoder: Any = _Decoder(source, transform, read_only=decode_on is not None)
        self._loader: DataLoader[Any] = DataLoader(
            decoder,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=outlive,
        )
        # Python ends child processes at its exit by SIGTERM and waits for them, and workers outlive SIGTERM.
        weakref.finalize(self, _stop_workers, self._loader, os.getpid())

    @property
    def _iterator(self) -> Any:
        """torch's iterator, under the name by which Lightning finds it to stop the workers when training ends or breaks
        off."""
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value

    def _produce(self, epoch: int, start: int) -> Iterator[tuple[Images, Tensor, Tensor]]:
        self._batches.epoch, self._batches.start = epoch, start
        try:
            for result in self._loader:
                images, labels, indices = _checked(result, self.source, self.quarantine)
                if self.decode_on is not None:
                    images = self._decoded(images, labels, indices)
                yield images, labels, indices
        except (UserError, SharedMemoryFull):
            self.close()
            raise

    def _decoded(self, images: Images, labels: Tensor, indices: Tensor) -> Images:
        """The images of a batch, decoded and moved to `decode_on`. Where a file does not decode, another image takes
        its place, and `labels` and `indices` are changed to match."""
        assert self.decode_on is not None
        if isinstance(images, Tensor):
            return send(images, self.decode_on)
        places = [place for place, image in enumerate(images) if image.ndim == 1]
        failures: list[DecodeError] = []
        for place, pixels in zip(
            places, decode_jpegs([images[place] for place in places], self.decode_on), strict=True
        ):
            if pixels is None:
                pixels, index = _Decoder(self.source).load(int(indices[place]), failures)
                indices[place], labels[place] = index, self.source.label(index)
            images[place] = pixels
        if failures:
            self.quarantine.report(failures, self.source.title, len(self.source))
        return [send(image, self.decode_on) for image in images]

    def close(self) -> None:
        """Stop the workers; iterating again starts new ones."""
        _stop_workers(self._loader, os.getpid())


def _stop_workers(loader: DataLoader[Any], owner: int) -> None:
    """End the workers of torch's loader, those that do not answer too. `owner`: the process whose children they are;
    a process that was forked from it leaves them alone."""
    iterator: Any = loader._iterator
    if not loader.num_workers or iterator is None or os.getpid() != owner:
        return
    iterator._shutdown_workers()  # asks, and waits for 5 s
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()
    loader._iterator = None


def auto_workers(workers: int | str, resident: bool, local_world: int = 1) -> int:
    """The number of decoding processes that `data.workers` stands for: auto = 0 for images in memory, else the cores of
    this rank, at most `MOST_WORKERS`."""
    if workers != "auto":
        if not isinstance(workers, int) or workers < 0:
            raise UserError(f"data.workers is {workers!r}; expected 'auto' or a number from 0.")
        return 0 if resident else workers
    own = cores()
    if "SLURM_STEP_ID" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:  # what srun gave to this rank alone
        own, local_world = int(os.environ["SLURM_CPUS_PER_TASK"]), 1
    return 0 if resident else max(1, min(MOST_WORKERS, own // max(1, local_world)))


class _Feed:
    """The batch sampler of a DataLoader that lives for all epochs. It yields `Batch` objects, so that workers know the
    step too."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan, self.epoch, self.start = plan, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        return self.plan.batches(self.epoch, self.start)

    def __len__(self) -> int:
        return len(self.plan) - self.start


class _Decoder:
    """The torch Dataset that runs in workers: one `Batch` in, `(images, labels, indices, failures, error)` out.

    Errors travel as data, because torch re-raises a worker's exception with the worker's traceback in its message.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[list[Tensor], Batch], Any] | None = None,
        read_only: bool = False,
    ) -> None:
        self.source, self.transform = source, transform
        self.read = functools.partial(read_file, source) if read_only else source.load

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, batch: Batch) -> tuple[Any, Tensor, Tensor, list[DecodeError], Exception | None]:
        images: list[Tensor] = []
        indices: list[int] = []
        failures: list[DecodeError] = []
        try:
            for index in batch.indices.tolist():
                image, index = self.load(index, failures)
                images.append(image)
                indices.append(index)
            result: Any = self.transform(images, batch) if self.transform is not None else _stack(images)
        except UserError as error:
            return [], torch.empty(0), torch.empty(0), failures, error
        chosen = torch.tensor(indices, dtype=torch.int64)
        labels = self.source.labels
        given = torch.full_like(chosen, -1) if labels is None else labels[chosen]
        if torch.utils.data.get_worker_info() is not None:
            try:
                _share([result, given, chosen])
            except SharedMemoryFull as error:
                return [], torch.empty(0), torch.empty(0), failures, error
        return result, given, chosen, failures, None

    def load(self, index: int, failures: list[DecodeError]) -> tuple[Tensor, int]:
        """(image `index`, `index`); if it does not decode, another image and its index. Appends to `failures`."""
        place = index
        for attempt in range(ATTEMPTS):
            found = try_load(self.read, index)
            if not isinstance(found, DecodeError):
                return found, index
            failures.append(found)
            index = stable_seed("replacement", place, attempt) % len(self.source)
        last = f"{failures[-1].path} ({failures[-1].reason})"
        raise UserError(f"{ATTEMPTS} images of {self.source.title} in a row do not decode; the last is {last}.")


class SharedMemoryFull(RuntimeError):
    """The machine's shared memory has no room for a batch that a worker has decoded."""


def _share(result: Any) -> None:
    """Move every tensor of a worker's result to shared memory, through which the main process gets it.

    torch would do it in the thread that feeds the queue between them. If shared memory is full at that point, torch
    drops the batch without a message, and the main process waits for it forever. This function waits until the main
    process has taken other batches, and raises SharedMemoryFull if that does not help.
    """
    if isinstance(result, (list, tuple)):
        for part in result:
            _share(part)
    elif isinstance(result, Tensor) and result.numel():
        for attempt in range(SHM_ATTEMPTS):
            try:
                result.share_memory_()
                return
            except RuntimeError as error:
                if "shared memory" not in str(error):
                    raise
            if attempt + 1 < SHM_ATTEMPTS:
                time.sleep(SHM_PAUSE)
        free = shutil.disk_usage(SHM)
        raise SharedMemoryFull(
            f"{SHM} is full: {free.free / 2**20:.0f} of {free.total / 2**20:.0f} MiB are free, and a batch of the"
            f" workers takes {result.nbytes / 2**20:.0f} MiB more. Give fewer --data.workers (0 needs none), a smaller"
            " --data.batch_size, or the machine more shared memory (docker run --shm-size 8g)."
        )


def _quarantine(given: Quarantine | None, source: ImageSource) -> Quarantine:
    return given or source.quarantine or Quarantine()


def _as_it_is(result: Any) -> Any:
    return result


def _labels(source: ImageSource) -> Tensor:
    return source.labels if source.labels is not None else torch.full((len(source),), -1, dtype=torch.int64)


class _Packed(NamedTuple):
    """Images of different sizes in one tensor. Each tensor that a worker passes on holds a file open, and a process may
    often open only 1,024."""

    pixels: Tensor
    shapes: list[torch.Size]

    def unpack(self) -> Packed:
        return Packed(self.pixels, [torch.Size(shape) for shape in self.shapes])


def _stack(images: list[Tensor]) -> Tensor | list[Tensor] | _Packed:
    """All images in one tensor, so that memory is shared with the main process once, not once an image; `_Packed` when
    the sizes differ."""
    if not images:
        return images
    if images[0].ndim == 3 and all(image.shape == images[0].shape for image in images):
        return torch.stack(images)
    return _Packed(torch.cat([image.flatten() for image in images]), [image.shape for image in images])


def _checked(result: tuple, source: ImageSource, quarantine: Quarantine) -> tuple[Images, Tensor, Tensor]:
    images, labels, indices, failures, error = result
    if failures:
        quarantine.report(list(failures), source.title, len(source))
    if error is not None:
        if failures and quarantine.file:
            raise UserError(f"{error} Files that do not decode are listed in {quarantine.file}.") from error
        raise error
    return images.unpack() if isinstance(images, _Packed) else images, labels, indices
