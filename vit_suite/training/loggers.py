"""The loggers of a run: metrics.csv always; Weights & Biases and TensorBoard if the options ask for them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from vit_suite.config import PretrainConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.logs import main_process
from vit_suite.training.metrics import MetricsLogger

WANDB_ID = "wandb_id"
"""File in the run directory with the id of its W&B run, which a resumed run goes on with."""
TENSORBOARD = "tensorboard"
"""Folder in the run directory with TensorBoard's event files, one for each start of the run."""


def build_loggers(cfg: PretrainConfig, folder: Path, steps_done: int) -> list[Logger]:
    """The loggers of a run that writes into `folder` and resumes after `steps_done` steps."""
    found = (build(cfg, folder, steps_done) for build in LOGGERS.values())
    return [logger for logger in found if logger is not None]


def csv(cfg: PretrainConfig, folder: Path, steps_done: int) -> Logger:
    """metrics.csv; always."""
    return MetricsLogger(folder, steps_done)


def wandb(cfg: PretrainConfig, folder: Path, steps_done: int) -> Logger | None:
    """Weights & Biases, for logger.wandb. A resumed run goes on with the same W&B run."""
    if not cfg.logger.wandb:
        return None
    check_wandb(cfg)
    known = folder / WANDB_ID
    run_id = known.read_text().strip() if known.is_file() and not cfg.run.overwrite else secrets.token_hex(4)
    place: dict[str, Any] = {
        "project": cfg.logger.wandb_project,
        "offline": cfg.logger.wandb_offline,
        "save_dir": str(folder),
    }
    return WandbLogger(name=cfg.run.name, id=run_id, resume="allow", config=asdict(cfg), **place)


def tensorboard(cfg: PretrainConfig, folder: Path, steps_done: int) -> Logger | None:
    """TensorBoard, for logger.tensorboard."""
    if not cfg.logger.tensorboard:
        return None
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        raise UserError("logger.tensorboard needs the tensorboard package: pip install 'vit-suite[tensorboard]'.")
    return Board(folder, steps_done)


LOGGERS: dict[str, Callable[[PretrainConfig, Path, int], Logger | None]] = {
    "csv": csv,
    "wandb": wandb,
    "tensorboard": tensorboard,
}
"""Name -> a function of (config, run directory, steps done before) that gives the logger, or None where its options do
not ask for it. A new logger is one function and one row here, and its options in LoggerConfig."""


class Board(TensorBoardLogger):
    """Writes `FOLDER/tensorboard`. A resumed run hides the entries after its checkpoint, because it logs those steps
    again."""

    def __init__(self, folder: Path, steps_done: int):
        resumed: dict[str, Any] = {"purge_step": steps_done} if steps_done else {}
        super().__init__(save_dir=str(folder), name="", version=TENSORBOARD, default_hp_metric=False, **resumed)

    def log_hyperparams(self, params: Any = None, metrics: Any = None, step: int | None = None) -> None:
        """The run directory's config.yaml holds them."""

    def save(self) -> None:
        """Without Lightning's hparams.yaml."""
        self.experiment.flush()

    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        """Pictures of the training, as W&B's logger takes them."""
        for number, image in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{number}"
            self.experiment.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")


def check_wandb(cfg: PretrainConfig) -> None:
    """UserError if W&B is not installed, or if it needs an account and this machine has none."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("logger.wandb needs the wandb package: pip install 'vit-suite[wandb]'.") from error
    if not cfg.logger.wandb_offline and main_process():
        try:
            wandb.login()
        except wandb.errors.UsageError as error:
            hint = "run `wandb login` first, or keep the log on disk with --logger.wandb_offline"
            raise UserError(f"logger.wandb: no account on this machine; {hint}.") from error


def remember(loggers: list[Logger], folder: Path) -> None:
    """Keep the id of the W&B run in the run directory."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _write(folder / WANDB_ID, f"{logger.version}\n")


def _write(file: Path, text: str) -> None:
    write_atomically(file, lambda path: path.write_text(text))
