"""What a training writes while it runs: last.ckpt, best.ckpt, kept epochs, and the backbone for everyone else.

Own callback instead of Lightning's ModelCheckpoint, because several of those with equal triggers clash, and because their atomic save
goes through the system's temporary folder: where that is another file system, as on most clusters, a kill leaves half a file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from vit_suite.config import CheckpointConfig
from vit_suite.weights.checkpoint import save_backbone
from vit_suite.weights.head import save_head


class Keeper(Checkpoint):
    """Writes `FOLDER/checkpoints/{last,best,epoch_NNNN}.ckpt` and `FOLDER/backbone.{safetensors,json}`, of a supervised
    method `FOLDER/head.safetensors` too.

    `best` follows the logged metric `monitor` (higher is better; None: there is no best) at the ends of epochs that logged it.
    `meta` goes into backbone.json.
    Lightning calls a `Checkpoint` after all other callbacks, so scores of the same epoch are there.
    """

    def __init__(self, folder: str | Path, cfg: CheckpointConfig, monitor: str | None = None, **meta: object):
        self.folder, self.cfg, self.monitor, self.meta = Path(folder), cfg, monitor, meta
        self.best: float | None = None
        self.saved_at = time.monotonic()
        self.saved_step = self.seen_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved_at, self.saved_step, self.seen_step = time.monotonic(), -1, trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        stepped, self.seen_step = trainer.global_step != self.seen_step, trainer.global_step
        if not stepped:  # between the micro-batches of a step, whose gradients no checkpoint holds: neither save nor stop here
            trainer.should_stop = False
            return
        if trainer.is_last_batch:  # saved after the epoch's score instead: a resumed run does not go back for that
            return
        # When training stops in mid-epoch this is the last moment at which Lightning still knows that it is one.
        if self._due(trainer) or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self.save(trainer, "last")

    def _due(self, trainer: pl.Trainer) -> bool:
        due = bool(self.cfg.every_steps) and trainer.global_step % self.cfg.every_steps == 0
        if self.cfg.every_minutes:
            elapsed = time.monotonic() - self.saved_at >= 60 * self.cfg.every_minutes
            due |= trainer.strategy.broadcast(elapsed)  # clocks of ranks differ, and saving is collective
        return due

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        score = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # A score of an earlier epoch stays in callback_metrics, and was compared then: it is not above the best.
        if score is not None and (self.best is None or float(score) > self.best):
            self.best = float(score)
            self.save(trainer, "best")
        if not trainer.is_last_batch:
            return
        if self.cfg.keep_every_epochs and done % self.cfg.keep_every_epochs == 0:
            self.save(trainer, f"epoch_{done:04d}")
        if self._due(trainer) or done % self.cfg.every_epochs == 0 or done == trainer.max_epochs or trainer.should_stop:
            self.save(trainer, "last")
            self.export(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer, "last")
        self.export(trainer, module)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint beside its final place and move it there in one step; never one whose weights are not finite."""
        sums = torch.stack([parameter.detach().float().sum() for parameter in trainer.lightning_module.parameters()])
        if not torch.isfinite(sums).all():
            raise RuntimeError(
                f"the weights are not finite at step {trainer.global_step}; {name}.ckpt stays as it was. "
                "Lower optim.lr, or train with trainer.precision=fp32."
            )
        path = self.folder / "checkpoints" / f"{name}.ckpt"
        partial = path.with_suffix(".ckpt.partial")
        trainer.save_checkpoint(partial, weights_only=False)  # False: optimiser and loops too
        if trainer.is_global_zero:
            os.replace(partial, path)
        if name == "last":
            self.saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def export(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the backbone that is evaluated (the teacher's for DINO), and its head where there is one."""
        if trainer.is_global_zero:
            at = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            digest = save_backbone(module.evaluation_backbone(), self.folder, module.mean, module.std, **at, **self.meta)
            head = module.evaluation_head()
            if head is not None:
                save_head(head, module.classes, self.folder, digest)
