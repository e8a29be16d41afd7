"""What a run shows of itself while it trains: status.json, and on a GPU its progress bar."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from vit_suite.training.scores import OnlineKNN
from vit_suite.training.status import Status, write_status

EVERY = 2.0  # seconds between two writings: of a millisecond each, and no one looks more often


class Progress(pl.Callback):
    """Writes `FOLDER/status.json` (main process): at the start, every few seconds, after each score, and when the run
    says how it ended.

    Args:
        batch_size: global; for images a second.
        steps_per_epoch, max_steps: optimizer steps.
        step: optimizer steps done before.
        knn: has the scores, where there are any.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        steps_per_epoch: int,
        max_steps: int,
        step: int = 0,
        knn: OnlineKNN | None = None,
    ):
        self.folder, self.batch_size, self.steps_per_epoch, self.max_steps = (
            Path(folder),
            batch_size,
            steps_per_epoch,
            max_steps,
        )
        self.step, self.knn = step, knn
        self.speed: float | None = None
        self._written_at = 0.0
        self._timed_from = (time.monotonic(), step)  # since when `speed` is measured: moment, step

    def write(self, state: str, reason: str | None = None) -> None:
        """Replace status.json."""
        left = None if self.speed is None else round((self.max_steps - self.step) * self.batch_size / self.speed, 1)
        speed = None if self.speed is None else round(self.speed, 1)
        epoch = self.step // self.steps_per_epoch
        knn = self.knn.history[-1][1] if self.knn and self.knn.history else None
        write_status(self.folder, Status(state, self.step, self.max_steps, epoch, speed, knn, left, reason))
        self._written_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self._timed_from = (time.monotonic(), self.step)
        if trainer.is_global_zero:
            self.write("running")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._timed_from = (
            time.monotonic(),
            trainer.global_step,
        )  # scores and checkpoints between epochs are no training

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.step = trainer.global_step
        if trainer.is_global_zero and (trainer.is_last_batch or time.monotonic() - self._written_at >= EVERY):
            now, (before, step) = time.monotonic(), self._timed_from
            if self.step > step:
                self.speed = (self.step - step) * self.batch_size / (now - before)
                self._timed_from = (now, self.step)
            self.write("running")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.write("running")


class PatientBar(TQDMProgressBar):
    """The progress bar of a GPU: reads the loss when it is drawn, once in `refresh_rate` batches. Lightning's own would
    read it after every batch, and have the GPU waited for."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        loss = trainer.logged_metrics.get("train/loss")
        return super().get_metrics(trainer, module) | ({} if loss is None else {"train/loss": float(loss)})
