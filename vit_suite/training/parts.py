"""The parts of a training: its data and its method, on a device, in a precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import pytorch_lightning as pl
import torch

from vit_suite.config import METHODS, PretrainConfig
from vit_suite.data.gpu_decode import check_decoder
from vit_suite.data.module import ImageDataModule
from vit_suite.data.quarantine import Quarantine
from vit_suite.errors import UserError, unknown_name
from vit_suite.hardware import own_gpu, pick_device, pick_precision
from vit_suite.methods.base import Method
from vit_suite.methods.compiled import check_compile, compile_blocks
from vit_suite.registry import Column
from vit_suite.views.multicrop import ViewsInWorkers, pick_backend

MODULES = Column("module")
"""Method name -> its LightningModule."""


class Parts(NamedTuple):
    """Everything that a training needs before there is a trainer."""

    data: ImageDataModule
    method: Method
    device: torch.device
    precision: Literal["bf16", "fp32"]
    origin: dict[str, str] = {}
    """Checkpoint that training starts from, and the license of its weights; backbone.json repeats it."""


def build_parts(cfg: PretrainConfig, folder: Path | None) -> Parts:
    """Seed everything; open the data and build the method of a training whose files lie in `folder`, or that writes
    none (None). Of files, only quarantine.txt is written, where images do not decode.

    Raises:
        UserError: options contradict each other, the data, or the machine.
    """
    if cfg.trainer.max_steps == 0:
        raise UserError("trainer.max_steps is 0; expected at least 1, or -1 to let trainer.max_epochs decide.")
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    pl.seed_everything(cfg.run.seed, workers=True, verbose=False)
    device = pick_device(cfg.trainer.accelerator)
    precision = pick_precision(cfg.trainer.precision, device)
    check_compile(cfg.trainer, device)
    quarantine = Quarantine(None if folder is None else folder / "quarantine.txt", cfg.data.max_corrupt)
    data = ImageDataModule(cfg.data, seed=cfg.run.seed, quarantine=quarantine, accumulate=cfg.trainer.accumulate)
    method = method_class(cfg).from_data(cfg, data)
    if cfg.trainer.compile != "none":
        compile_blocks(method, graphs=cfg.trainer.compile == "graphs")
    data.setup("fit")
    if data.resident and cfg.views.backend == "workers":
        raise UserError(
            "views.backend is workers, but the images are held in memory and no worker reads them: add --data.resident"
            " false."
        )
    check_decode(cfg, data, device)
    if not data.resident and pick_backend(cfg.views, device.type, ragged=True) == "workers":
        data.transform = ViewsInWorkers(method.views, cfg.run.seed, cfg.data.batch_size)
    return Parts(data, method, device, precision)


def method_class(cfg: PretrainConfig) -> type[Method]:
    """The LightningModule whose options `cfg.method` are. UserError if no method has that name."""
    if cfg.method.name not in METHODS:
        raise unknown_name("method", cfg.method.name, METHODS)
    return MODULES[cfg.method.name]


def check_decode(cfg: PretrainConfig, data: ImageDataModule, device: torch.device) -> None:
    """UserError if data.decode is gpu and there is nothing to decode on a GPU, or no decoder."""
    if cfg.data.decode == "cpu":
        return
    reasons = {
        "this training is on a CPU": device.type != "cuda",
        f"it gives RGB, and data.channels is {cfg.data.channels}": cfg.data.channels != 3,
        "the images are held in memory, decoded once (--data.resident false changes that)": data.resident,
        "views.backend workers needs the pixels in the workers": cfg.views.backend == "workers",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"data.decode is gpu, but {reason}: use data.decode cpu.")
    check_decoder(own_gpu(device))
