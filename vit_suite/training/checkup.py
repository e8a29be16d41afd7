"""Checks of a training before it waits in a queue. Each finding is ok, a warning, or an error with its remedy.

Cheap checks (`of_run`) look only at numbers; every training logs their warnings at its start. The others decode some
images (`of_images`) or make a few steps (`of_steps`), for `vit-suite doctor`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vit_suite import distributed
from vit_suite.config import PretrainConfig, ViewsConfig
from vit_suite.config.limits import pair, spell_sides
from vit_suite.data.decode import DecodeError
from vit_suite.data.module import ImageDataModule
from vit_suite.data.order import FEW_STEPS, fitting_batch
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, counted
from vit_suite.methods.base import Method
from vit_suite.optim.schedules import peak_rate

FEW_IN_ALL = 1000
"""Optimizer steps of a whole run from which such short epochs need no warning: there are enough of them."""
SAMPLED = 64
"""Images that are decoded for a check."""
HASHED = 20_000
"""Files of each split whose contents are compared. Reading so many takes a minute on a slow disk."""
ROOM = 1.2
"""Free disk, as a multiple of what checkpoints need: other files of a run need room too."""


class Finding(NamedTuple):
    """The result of one check."""

    level: Literal["ok", "warning", "error"]
    what: str
    """What was checked, in two or three words."""
    said: str
    """The result, with figures."""
    mend: str = ""
    """The remedy."""

    def __str__(self) -> str:
        return f"{self.what}: {self.said}" + (f" {self.mend}" if self.mend else "")


# Cheap checks of numbers.


def of_run(cfg: PretrainConfig, data: ImageDataModule, method: Method, ranks: int) -> list[Finding]:
    """All checks that need only the options, the number of images and the disk."""
    return [
        *of_batch(cfg, data, ranks),
        of_crops(cfg, method),
        *of_copies(cfg, method),
        of_disk(cfg, method),
        *of_environment(os.environ),
    ]


def of_batch(cfg: PretrainConfig, data: ImageDataModule, ranks: int) -> Iterator[Finding]:
    """The global batch, the scaled rate, the steps per epoch, and the images that are left over."""
    batch, images = cfg.data.batch_size, len(data.train_source)
    rate = peak_rate(cfg.optim.lr, batch, cfg.optim.lr_scaling)
    local = batch // (ranks * cfg.trainer.accumulate)
    yield Finding(
        "ok",
        "batch",
        f"global batch {batch} = {counted(ranks, 'rank')} x {cfg.trainer.accumulate} accumulated x"
        f" {counted(local, 'image')}; peak learning rate {rate:.3g}.",
    )
    steps, left = images // batch, images % batch
    said = f"{counted(images, 'image')} make {counted(steps, 'step')} of {batch} an epoch"
    if cfg.data.repeats > 1:
        said += f", which see {steps * batch // cfg.data.repeats:,} of them {cfg.data.repeats} times."
    else:
        said += f", {counted(left, 'image')} sit out." if left else "."
    epochs = cfg.trainer.max_epochs
    total = steps * epochs if cfg.trainer.max_steps == -1 else min(steps * epochs, cfg.trainer.max_steps)
    if steps < FEW_STEPS and total < FEW_IN_ALL:
        better = fitting_batch(images)
        mend = f"Try data.batch_size {better}: {counted(images // better, 'step')} an epoch."
        yield Finding("warning", "steps", said, mend if better < batch else "There are few images.")
    else:
        yield Finding("ok", "steps", said)
    if cfg.optim.warmup_epochs * steps > total / 2:
        yield Finding(
            "warning",
            "warm-up",
            f"it takes {cfg.optim.warmup_epochs:g} epochs of {counted(steps, 'step')}, and the whole run has"
            f" {counted(total, 'step')}.",
            f"Try optim.warmup_epochs {max(0.1, 0.1 * total / max(1, steps)):.2g}.",
        )


def of_crops(cfg: PretrainConfig, method: Method) -> Finding:
    """The number of patches in each crop."""
    views, (rows, columns) = cfg.views, method.evaluation_backbone().patch
    sizes = {"global": pair(views.global_size)}
    if isinstance(views, ViewsConfig) and views.local_crops:
        sizes["local"] = pair(views.local_size)
    grids = {name: (height // rows, width // columns) for name, (height, width) in sizes.items()}
    patch = spell_sides((rows, columns))
    said = ", ".join(
        f"{name} {spell_sides(sizes[name])} px = {h} x {w} patches of {patch}" for name, (h, w) in grids.items()
    )
    if min(h * w for h, w in grids.values()) < 2:
        return Finding("warning", "crops", said + ".", "One patch a crop tells little: a smaller backbone.patch_size.")
    return Finding("ok", "crops", said + ".")


def of_copies(cfg: PretrainConfig, method: Method) -> Iterator[Finding]:
    """Whether the loss takes copies of one image for different images."""
    apart = [name for name in method.compares_images() if name in ("negatives", "KoLeo")]
    if cfg.data.repeats > 1 and apart:
        said = f"data.repeats {cfg.data.repeats}: {' and '.join(apart)} would push copies of one image apart."
        yield Finding("warning", "copies", said, "Leave data.repeats out.")


def of_disk(cfg: PretrainConfig, method: Method) -> Finding:
    """Free disk for the checkpoints: all weights, and AdamW's two moments of the trained ones."""
    every = cfg.saving.keep_every_epochs
    kept = 3 + (cfg.trainer.max_epochs // every if every else 0)  # last, the next last, best
    weights = sum(tensor.numel() * tensor.element_size() for tensor in method.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in method.trained().parameters() if p.requires_grad)
    need = kept * (weights + moments)
    folder = Path(cfg.run.output).absolute()
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(above).free
    said = f"{kept} checkpoints take {amount(need)}; {amount(free)} are free at '{above}'."
    if free < ROOM * need:
        mend = "Name another run.output" + (", or raise saving.keep_every_epochs." if every else ".")
        return Finding("error", "disk", said, mend)
    return Finding("ok", "disk", said)


def of_logger(cfg: PretrainConfig) -> Iterator[Finding]:
    """Whether W&B is installed and can be reached, or keeps its log on this machine."""
    if not cfg.logger.wandb:
        return
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        yield Finding("error", "W&B", "logger.wandb is true, and wandb is not installed.", "pip install wandb")
        return
    mode = "offline" if cfg.logger.wandb_offline else os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled", "dryrun"):
        yield Finding("ok", "W&B", f"{mode}: nothing is sent.")
    elif not reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        yield Finding(
            "error", "W&B", "its server does not answer from here.", "Add --logger.wandb_offline, and sync later."
        )
    else:
        yield Finding("ok", "W&B", "its server answers.")


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether a TCP connection to the host of an address opens."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=seconds).close()
    except (OSError, ValueError):
        return False
    return True


def of_environment(environment: Mapping[str, str]) -> Iterator[Finding]:
    """SLURM's tasks against the start of this process: without srun it would wait for its peers until it is killed."""
    tasks = environment.get("SLURM_NTASKS", "")
    if not tasks.isdigit() or int(tasks) < 2:
        return
    inside = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    if not inside and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        yield Finding(
            "warning",
            "SLURM",
            f"the job has {tasks} tasks, and this process was not started by srun.",
            "Start it as `srun vit-suite ...`, or let `vit-suite launch` write the script.",
        )
    per_node = environment.get("SLURM_NTASKS_PER_NODE")
    if per_node is None:
        yield Finding(
            "warning",
            "SLURM",
            f"{tasks} tasks without --ntasks-per-node: Lightning refuses that.",
            "Give it to sbatch.",
        )


# Checks of some images.


def of_images(data: ImageDataModule) -> Iterator[Finding]:
    """A sample of the training images, the images per class, and files that both splits have."""
    train = data.train_source
    yield of_sample(train)
    yield from of_classes(train)
    try:
        test = data.test_source
    except UserError as error:
        yield Finding("ok", "test split", f"none ({error})")
        return
    if test.split != train.split:
        yield of_twins(train, test)


def of_sample(source: ImageSource) -> Finding:
    """Sizes and brightness of some images, and the images that do not decode."""
    count = len(source)
    chosen = sorted({round(place) for place in torch.linspace(0, count - 1, min(SAMPLED, count)).tolist()})
    sides: list[tuple[int, int]] = []
    means: list[float] = []
    broken: list[str] = []
    for index in chosen:
        try:
            image = source.load(index)
        except DecodeError as error:
            broken.append(str(error))
            continue
        sides.append((image.shape[-2], image.shape[-1]))
        means.append(float(image.float().mean()))
    if not sides:
        return Finding(
            "error", "images", f"none of {len(chosen)} decodes; the first: {broken[0]}.", "Look at the files."
        )
    heights, widths = zip(*sides, strict=True)
    said = (
        f"{len(sides)} of {len(chosen)} decode; {min(widths)} to {max(widths)} wide, {min(heights)} to {max(heights)}"
        f" high; mean brightness {sum(means) / len(means):.0f} of 255"
    )
    if broken:
        return Finding("warning", "images", f"{said}; the first that does not: {broken[0]}.", "See data.max_corrupt.")
    flat = sum(mean < 3 or mean > 252 for mean in means)
    if flat > len(means) / 10:
        mend = "Look at them; for files of more than 8 bits see data.value_range."
        return Finding("warning", "images", f"{said}; {flat} are nearly black or white.", mend)
    return Finding("ok", "images", said + ".")


def of_classes(source: ImageSource) -> Iterator[Finding]:
    """The number of images per class."""
    if source.labels is None:
        yield Finding("ok", "labels", "none: kNN and linear scores need another set.")
        return
    counts = torch.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    least, most = int(counts.min()), int(counts.max())
    said = f"{len(source.classes)} classes of {least:,} to {most:,} images"
    unlabeled = int((source.labels < 0).sum())
    said += f", {unlabeled:,} without a label." if unlabeled else "."
    if not least:
        empty = [name for name, count in zip(source.classes, counts.tolist(), strict=False) if not count]
        yield Finding("warning", "classes", said, f"Empty: {', '.join(map(shown, empty[:5]))}.")
    elif most > 10 * least:
        yield Finding("warning", "classes", said, "Accuracy is that of the large ones; look at the confusion matrix.")
    else:
        yield Finding("ok", "classes", said)


def of_twins(train: ImageSource, test: ImageSource) -> Finding:
    """Test files with the same bytes as a training file."""
    known = dict(hashes(train))
    if not known:
        return Finding("ok", "duplicates", "not compared: the images are no files.")
    twins = [(path, known[digest]) for digest, path in hashes(test) if digest in known]
    compared = f"of {min(len(test), HASHED):,} test and {min(len(train), HASHED):,} training files"
    if twins:
        first = f"'{shown(twins[0][0])}' is '{shown(twins[0][1])}'"
        said = f"{len(twins)} {compared} have the same bytes; {first}."
        return Finding("warning", "duplicates", said, "Scores on them count what was learned by heart.")
    return Finding("ok", "duplicates", f"none {compared}.")


def hashes(source: ImageSource) -> Iterator[tuple[bytes, str]]:
    """(digest of the bytes, path) of the first `HASHED` files."""
    for index in range(min(len(source), HASHED)):
        content = source.content(index)
        if content is not None:
            yield hashlib.blake2b(content, digest_size=16).digest(), source.path(index)


# Checks of some steps.


class Steps(NamedTuple):
    """The time and memory of a few steps on one device."""

    seconds: float
    """Per step of `images` images."""
    images: int
    peak_bytes: int
    device: torch.device


def of_steps(cfg: PretrainConfig, data: ImageDataModule, steps: Steps, ranks: int) -> Iterator[Finding]:
    """The time of a step and of the whole run, and the memory compared with that of the device."""
    local = cfg.data.batch_size // ranks
    per_epoch = len(data.train_source) // cfg.data.batch_size
    total = per_epoch * cfg.trainer.max_epochs
    total = total if cfg.trainer.max_steps == -1 else min(total, cfg.trainer.max_steps)
    seconds = steps.seconds * local / steps.images
    hours = seconds * total / 3600
    whole = f"{counted(total, 'step')}: {spoken(3600 * hours)}"
    said = f"{seconds:.2f} s a step of {counted(local, 'image')} a rank here; {whole}."
    limit = cfg.trainer.max_minutes
    if hours > 24 and steps.device.type == "cpu":
        yield Finding("warning", "time", said, "That is long for a CPU: see docs/which_recipe.md.")
    elif limit is not None and 60 * hours > limit:
        yield Finding(
            "warning", "time", said, f"trainer.max_minutes {limit:g} ends it before: schedules do not finish."
        )
    else:
        yield Finding("ok", "time", said)
    if steps.device.type == "cuda":
        have = torch.cuda.get_device_properties(steps.device).total_memory
        need = steps.peak_bytes
        said = f"a step took {amount(need)} of {amount(have)}."
        level: Literal["ok", "warning"] = "warning" if need > 0.92 * have else "ok"
        yield Finding(level, "GPU memory", said, "Raise trainer.accumulate." if level == "warning" else "")
    elif steps.peak_bytes:
        yield Finding("ok", "memory", f"this process took {amount(steps.peak_bytes)}.")


# Texts.


def amount(count: float) -> str:
    """A number of bytes in words: `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def spoken(seconds: float) -> str:
    """A duration in words: `12 minutes`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def shown(name: str) -> str:
    """A file name for a message; bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def ranks_of(cfg: PretrainConfig) -> int:
    """The number of ranks of the run: those that a launcher started, else what the options say."""
    if (found := distributed.started()) is not None:
        return found[0] * found[1]
    devices = cfg.trainer.devices
    if isinstance(devices, int):
        return devices * cfg.trainer.nodes
    return cfg.trainer.nodes * (max(1, torch.cuda.device_count()) if cfg.trainer.accelerator != "cpu" else 1)
