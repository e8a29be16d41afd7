"""How long a training on a CPU will take and how much memory it needs, said before its first step.

A GPU makes its first steps within seconds and its progress line says the rest. On a CPU a recipe that was made for a
cluster may need minutes for one step, or more memory than there is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from vit_suite.data.decode import DecodeError
from vit_suite.data.source import ImageSource
from vit_suite.errors import counted
from vit_suite.hardware import cores
from vit_suite.training.checkup import amount, spoken
from vit_suite.training.progress import Length

log = logging.getLogger("vit_suite")

FEWEST = 2
"""Images of the first trial; a contrastive loss needs two."""
ENOUGH = 0.3
"""Seconds of work of a trial from which its time counts: below, the fixed cost of a step would be taken for that of
images."""
ONCE = 5.0
"""Seconds of work of the first trial up to which it is made again: the first pass of a process also pays what is paid
once."""
TOLD = 0.01
"""Share of a step from which the time of reading is said."""
LONG = 24 * 3600
"""Seconds of a training on a CPU from which it is a warning."""


class Trial(NamedTuple):
    """What the forward and backward pass of some images took."""

    images: int
    seconds: float
    work: float
    """The seconds, or the process's CPU time where that is less. Other programs on the machine stretch the seconds of
    two images to many, and leave the work as it is."""
    kept_bytes: int
    """Activations that the backward pass needs."""


class Forecast(pl.Callback):
    """Tries the loss and its gradients on a few images before the first step, and says what the run will take.

    Weights, buffers, gradients and random numbers are afterwards as before, so the training is the same without it.
    Only for one process on a CPU.
    """

    def __init__(self, source: ImageSource, length: Length, accumulate: int, max_minutes: float | None) -> None:
        self.source, self.length, self.accumulate, self.max_minutes = source, length, accumulate, max_minutes

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if module.device.type != "cpu" or trainer.world_size > 1 or trainer.global_step:
            return
        micro = self.length.batch_size // self.accumulate
        images, reading = some_images(self.source, micro)
        if len(images) < FEWEST:
            return
        found = trial(trainer, module, images[:FEWEST])
        if found.work < ONCE:
            found = trial(trainer, module, images[:FEWEST])
        while found.work < ENOUGH and found.images < len(images):
            found = trial(trainer, module, images[: 2 * found.images])
        computing = found.seconds * self.length.batch_size / found.images
        reading = reading * self.length.batch_size / cores()
        memory = memory_of(module, found, micro)
        self.say(computing, reading, memory)

    def say(self, computing: float, reading: float, memory: int) -> None:
        """One line: hours and memory of the run; a warning where they are more than one would want."""
        steps, batch = self.length.max_steps, self.length.batch_size
        each = computing + reading
        seconds = each * steps
        free = free_memory()
        read = f" ({reading:.2g} s of it reading)" if reading > TOLD * each else ""
        said = (
            f"about {spoken(seconds)} of training: {counted(steps, 'step')} of {counted(batch, 'image')},"
            f" {each:.2g} s each{read}; about {amount(memory)} of memory"
            + (f", {amount(free)} are free" if free else "")
            + ". Scores and other programs on this machine come on top."
        )
        if free and memory > free:
            mend = f"It will not fit: try --data.batch_size {max(1, batch // 4)} or a smaller network."
        elif self.max_minutes is not None and each > 60 * self.max_minutes:
            mend = f"trainer.max_minutes {self.max_minutes:g} is over within the first step, which is finished first."
        elif self.max_minutes is not None and seconds > 60 * self.max_minutes:
            mend = f"trainer.max_minutes {self.max_minutes:g} ends it before that."
        elif seconds > LONG:
            mend = "That is long for a CPU: a smaller views.global_size or network, or one of `vit-suite recipes cpu`."
        else:
            log.info("%s", said)
            return
        log.warning("%s %s", said, mend)


def some_images(source: ImageSource, most: int) -> tuple[list[Tensor], float]:
    """(at most `most` training images, uint8 (C, H, W), seconds that one took to read): as many as a second reads.

    Images of one size may be many; of photographs a second reads a few, and those stand for the rest.
    """
    images: list[Tensor] = []
    started = time.perf_counter()
    for index in range(len(source)):
        if len(images) >= most or (len(images) >= FEWEST and time.perf_counter() - started > 1):
            break
        try:
            images.append(source.load(index))
        except DecodeError:
            continue
    return images, (time.perf_counter() - started) / max(1, len(images))


def trial(trainer: pl.Trainer, module: Any, images: list[Tensor]) -> Trial:
    """Views, loss and gradients of `images` as a training step makes them; the module stays as it was."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with untouched(module), trainer.precision_plugin.forward_context():
        started, worked = time.perf_counter(), time.process_time()
        draw = module.draw(0, len(images))
        labels = torch.zeros(len(images), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module.losses(module.crops(images, draw), labels, draw, False)["loss"]
        loss.backward()
        seconds = time.perf_counter() - started
        return Trial(len(images), seconds, min(seconds, time.process_time() - worked), sum(kept.values()))


@contextmanager
def untouched(module: Any) -> Iterator[None]:
    """Whatever is computed inside leaves buffers (statistics of BatchNorm), gradients and torch's generator alone."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
        module.zero_grad(set_to_none=True)


def memory_of(module: Any, found: Trial, micro: int) -> int:
    """Bytes that this process will hold in a step of `micro` images at a time.

    They are what it holds now, the gradients, AdamW's two moments, and the activations.
    """
    trained = sum(p.numel() * p.element_size() for p in module.trained().parameters() if p.requires_grad)
    return held_memory() + 3 * trained + found.kept_bytes * micro // found.images


def held_memory() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int:
    """Bytes that this process holds or could have, within its container's limit; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024 + held_memory()
    except (OSError, KeyError, ValueError):
        return 0
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            free = min(free, int(Path(path).read_text()))
        except (OSError, ValueError):  # "max", or no such file
            continue
    return free
