"""What a training writes while it runs: last.ckpt, best.ckpt, kept epochs, and the backbone for everyone else; where it
stops for a signal.

Own callback instead of Lightning's ModelCheckpoint, because several of those with equal triggers clash, and because
their atomic save goes through the system's temporary folder: where that is another file system, as on most clusters, a
kill leaves half a file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from vit_suite import distributed
from vit_suite.config import SavingConfig
from vit_suite.files import PARTIAL, put_in_place
from vit_suite.places import reason, why_not_written
from vit_suite.signals import Signals, Stopped
from vit_suite.weights.checkpoint import save_backbone
from vit_suite.weights.head import save_head

MOST_NEEDED = 100 * 2**20
"""Bytes. Where fewer are free after a failure to write, the disk was full: a failed write gives its room back."""


def not_written(path: Path, partial: Path, error: Exception, step: int) -> RuntimeError:
    """The error to raise for a checkpoint that could not be written: why, and how the run goes on. What was written of
    it is removed, so that it takes no room."""
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        pass
    why = why_not_written(path.parent)
    if why is None and isinstance(error, OSError):
        why = reason(error)
    if why is None and shutil.disk_usage(path.parent).free < MOST_NEEDED:
        why = "the disk is full"
    why = why or " ".join(str(error).split())[:200]
    return RuntimeError(
        f"'{path}' cannot be written at step {step}: {why}. Mend that and give the same command again: it goes on from"
        " the checkpoint before."
    )


class Keeper(Checkpoint):
    """Writes `FOLDER/checkpoints/{last,best,epoch_NNNN}.ckpt` and `FOLDER/backbone.{safetensors,json}`, of a supervised
    method `FOLDER/head.safetensors` too.

    `best` follows the logged metric `monitor` (higher is better; None: there is no best) at the ends of epochs that
    logged it. `meta` goes into backbone.json. Lightning calls a `Checkpoint` after all other callbacks, so scores of
    the same epoch are there.

    A signal that any rank has noted in `signals` stops all of them after the same step: `Stopped` is raised before the
    next one, when the metrics of the last are logged. In the last step of an epoch it waits for the epoch's score,
    which a resumed run does not make up.
    """

    def __init__(
        self,
        folder: str | Path,
        cfg: SavingConfig,
        monitor: str | None = None,
        signals: Signals | None = None,
        **meta: object,
    ):
        self.folder, self.cfg, self.monitor, self.signals, self.meta = Path(folder), cfg, monitor, signals, meta
        self.best: float | None = None
        self.saved_at = time.monotonic()
        self.saved_step = self.seen_step = 0
        self.signal = 0  # the one that all ranks stop for
        self.late = False  # every_minutes have passed since last.ckpt was written
        self._answer: Callable[[], list[int]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.saved_at, self.saved_step, self.seen_step = time.monotonic(), -1, trainer.global_step
        step = trainer.global_step
        most, least = distributed.largest([step, -step], module.device)()
        if most != -least:
            raise RuntimeError(
                f"ranks resume from different steps, {-least} to {most}: is run.output on a file system that all"
                " machines share?"
            )
        if self.signals:
            self.signals.listen()  # here, because Lightning puts its own handlers in place just before
            # Its word to the other ranks of a SIGTERM, which its handler no longer hears, would make GPUs wait before
            # every batch.
            loop: Any = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = lambda: None

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self._stop(trainer, module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._stop(trainer, module)

    def _stop(self, trainer: pl.Trainer, module: Any) -> None:
        if self.signal:
            self.export(trainer, module)
            raise Stopped(self.signal, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        stepped, self.seen_step = trainer.global_step != self.seen_step, trainer.global_step
        if (
            not stepped
        ):  # between the micro-batches of a step, whose gradients no checkpoint holds: neither save nor stop here
            trainer.should_stop = False
            return
        self._agree(module.device)
        if trainer.is_last_batch:  # saved after the epoch's score instead: a resumed run does not go back for that
            return
        # When training stops in mid-epoch this is the last moment at which Lightning still knows that it is one.
        if self._due(trainer) or self.signal or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self.save(trainer, "last")

    def _agree(self, device: torch.device) -> None:
        """Settle `signal` and `late` among the ranks: saving is collective, but signals come at different moments and
        clocks differ.

        Every step, since a warning may come seconds before the end; one rank asks nobody. GPUs act on the answer of the
        step before, so that none waits for it.
        """
        minutes = self.cfg.every_minutes
        elapsed = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        answer: Callable[[], list[int]] | None = distributed.largest(
            [self.signals.noted if self.signals else 0, elapsed and distributed.rank() == 0], device
        )
        if device.type == "cuda" and distributed.active():
            answer, self._answer = self._answer, answer
        self.signal, late = answer() if answer is not None else (0, 0)
        self.late = bool(late)

    def _due(self, trainer: pl.Trainer) -> bool:
        steps = self.cfg.every_steps
        return self.late or (steps is not None and trainer.global_step % steps == 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
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
        ends = done == trainer.max_epochs or trainer.should_stop or self.signal
        if self._due(trainer) or done % self.cfg.every_epochs == 0 or ends:
            self.save(trainer, "last")
            self.export(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer, "last")
        self.export(trainer, module)

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Write a checkpoint beside its final place and move it there in one step; never one whose weights are not
        finite."""
        sums = torch.stack(
            [distributed.own_part(parameter).float().sum() for parameter in trainer.lightning_module.parameters()]
        )
        if not torch.isfinite(distributed.mean_over_ranks(sums)).all():  # of all ranks, which stop or go on together
            raise RuntimeError(
                f"the weights are not finite at step {trainer.global_step}; {name}.ckpt stays as it was. "
                "Lower optim.lr, or train with trainer.precision=fp32."
            )
        path = self.folder / "checkpoints" / f"{name}.ckpt"
        partial = path.with_name(path.name + PARTIAL)
        try:
            trainer.save_checkpoint(partial, weights_only=False)  # False: optimizer and loops too
            if trainer.is_global_zero:
                put_in_place(partial, path)
        except (OSError, RuntimeError) as error:  # torch's writer answers a full disk with RuntimeError
            raise not_written(path, partial, error, trainer.global_step) from error
        if name == "last":
            self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
            self._answer = (
                None  # to a question of before: a clock that has just been reset, or a signal that is asked for again
            )

    def export(self, trainer: pl.Trainer, module: Any) -> None:
        """Write the backbone that is evaluated (the teacher's for DINO), and its head where there is one. All ranks
        call this."""
        module = module.whole()
        if trainer.is_global_zero:
            at = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            digest = save_backbone(
                module.evaluation_backbone(), self.folder, module.mean, module.std, **at, **self.meta
            )
            head = module.evaluation_head()
            if head is not None:
                save_head(head, module.classes, self.folder, digest)
