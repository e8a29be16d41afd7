"""How a run shows its progress: status.json, lines in the log, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.profilers import Profiler

from vit_suite.training.scores import OnlineScore
from vit_suite.training.status import Status, progress_text, read_status, write_status

log = logging.getLogger("vit_suite")

EVERY = 2.0
"""Seconds between two writes of status.json; a write takes a millisecond."""
STALLED = 1 / 3
"""Share of its time that a training may wait for images without a warning."""
PATIENCE = 60.0
"""Seconds of training before that warning, because the first batches of an epoch always make it wait."""


class LoaderClock(Profiler):
    """Adds up the seconds in which the training loop waits for its next batch. Lightning marks this time for its
    profilers."""

    ACTION = "[_TrainingEpochLoop].train_dataloader_next"

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name == self.ACTION:
            self._since = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name == self.ACTION:
            self.seconds += time.monotonic() - self._since


class Length(NamedTuple):
    """How long a training is."""

    batch_size: int
    """Images per optimizer step, over all ranks."""
    steps_per_epoch: int
    max_steps: int


class _Moment(NamedTuple):
    time: float
    step: int
    waited: float


class Progress(pl.Callback):
    """Writes `FOLDER/status.json` on the main process: at the start, every few seconds, after each score, and at the
    end. Warns once when the training waits a lot for images.

    Args:
        step: optimizer steps done before.
        knn: the callback with the kNN scores, if there is one.
        line_every: seconds between two lines with the progress in the log; None for no lines.
    """

    def __init__(
        self,
        folder: str | Path,
        length: Length,
        step: int = 0,
        knn: OnlineScore | None = None,
        line_every: float | None = None,
    ):
        self.folder, self.length, self.step, self.knn, self.line_every = Path(folder), length, step, knn, line_every
        self.clock = LoaderClock()
        self.speed: float | None = None
        self.waiting: float | None = None
        self._written_at = 0.0
        self._said_at = time.monotonic()
        self._timed_from = _Moment(self._said_at, step, 0.0)  # where the current measurement began
        self._trained = self._waited = 0.0  # seconds since the start of the run
        self._warned = False

    def write(self, state: Literal["running", "stopped", "done", "failed"], reason: str | None = None) -> Status:
        """Replace status.json, and return its content. A run that goes on, or that the launcher ends, does not
        overwrite the failure of a rank."""
        left = (self.length.max_steps - self.step) * self.length.batch_size
        status = Status(
            state,
            self.step,
            self.length.max_steps,
            self.step // self.length.steps_per_epoch,
            images_per_second=None if self.speed is None else round(self.speed, 1),
            knn=self.knn.history[-1][1] if self.knn and self.knn.history else None,
            seconds_left=None if self.speed is None else round(left / self.speed, 1),
            waiting=None if self.waiting is None else round(self.waiting, 3),
            reason=reason,
        )
        failed = self._written_at and (before := read_status(self.folder)) and before.state == "failed"
        if not (failed and state in ("running", "stopped")):
            write_status(self.folder, status)
        self._written_at = time.monotonic()
        return status

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self._restart(trainer)
        if trainer.is_global_zero:
            self.write("running")

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restart(trainer)  # scores and checkpoints between epochs do not count as training

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if trainer.is_last_batch or time.monotonic() - self._written_at >= EVERY:
            self._measure(trainer)
            status = self.write("running")
            if self.line_every is not None and time.monotonic() - self._said_at >= self.line_every:
                self._said_at = time.monotonic()
                log.info("%s", line(status, said(trainer)))

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.write("running")

    def _restart(self, trainer: pl.Trainer) -> None:
        self._timed_from = _Moment(time.monotonic(), trainer.global_step, self.clock.seconds)

    def _measure(self, trainer: pl.Trainer) -> None:
        """Measure speed and share of waiting since the last measurement."""
        now, before = time.monotonic(), self._timed_from
        if self.step == before.step or now == before.time:  # clocks of some systems tick in 15 ms
            return
        seconds, waited = now - before.time, self.clock.seconds - before.waited
        self.speed = (self.step - before.step) * self.length.batch_size / seconds
        self.waiting = waited / seconds
        self._trained += seconds
        self._waited += waited
        self._restart(trainer)
        if not self._warned and self._trained >= PATIENCE and self._waited > STALLED * self._trained:
            self._warned = True
            log.warning(
                "%.0f%% of the training time is spent waiting for images: the loader is slower than the model. More"
                " data.workers, data.resident, or shards help (docs/data.md).",
                100 * self._waited / self._trained,
            )


SAID = {"train/loss": "loss", "train/kl": "KL"}
"""Metrics that a line shows, and their words. DINO's loss also rises with the teacher's entropy, its KL does not."""


def said(trainer: pl.Trainer) -> dict[str, float]:
    """The newest logged value of each metric of `SAID` that the method has."""
    return {SAID[name]: float(value) for name, value in trainer.logged_metrics.items() if name in SAID}


def line(status: Status, numbers: Mapping[str, float]) -> str:
    """`epoch 2, step 120 of 9750, 812 images/s, loss 8.1234, KL 0.8765, kNN 45.10%, 12 min left`;
    `numbers`: those of `SAID`, by their words."""
    words = "".join(f", {name} {numbers[name]:.4f}" for name in SAID.values() if name in numbers)
    return f"epoch {status.epoch + 1}, {progress_text(status)}".replace(" images/s", f" images/s{words}", 1)


class PatientBar(TQDMProgressBar):
    """The progress bar of a training on a GPU. It reads the loss only when it is drawn, once in `refresh_rate` batches.
    Lightning's own bar reads it after every batch, and makes the GPU wait each time."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        loss = trainer.logged_metrics.get("train/loss")
        return super().get_metrics(trainer, module) | ({} if loss is None else {"train/loss": float(loss)})


def on_terminal() -> bool:
    """Whether a progress bar can be drawn: standard output is a terminal, not a log file."""
    return sys.stdout is not None and sys.stdout.isatty()
