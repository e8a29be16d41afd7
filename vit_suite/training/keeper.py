"""Checkpoints of a training (last, best, kept epochs) and the exported backbone; where a training stops for a signal or
at its time limit.

This callback replaces Lightning's ModelCheckpoint for two reasons. Several of those with equal triggers clash. And
their atomic save goes through the system's temporary folder: if that is another file system, as on most clusters, a
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

SIGTERM_BROADCAST = "_broadcast_sigterm_tensor"
"""Lightning's function that tells all ranks of a SIGTERM."""
MOST_NEEDED = 100 * 2**20
"""Bytes. If fewer are free after a failed write, whose part file has been removed, then the disk is full."""


def not_written(path: Path, partial: Path, error: Exception, step: int) -> RuntimeError:
    """The error for a checkpoint that could not be written: the reason, and how the run goes on. The part file is
    removed, so that it takes no room."""
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        pass
    why = why_not_written(path.parent)
    if why is None and isinstance(error, OSError):
        why = reason(error)
    if why is None and shutil.disk_usage(path.parent).free < MOST_NEEDED:
        why = "the disk is full"
    why = why or " ".join(str(error).split())[:200]  # torch's own messages may have pages
    return RuntimeError(
        f"'{path}' cannot be written at step {step}: {why}. Mend that and give the same command again: it goes on from"
        " the checkpoint before."
    )


class Keeper(Checkpoint):
    """Writes `FOLDER/checkpoints/{last,best,epoch_NNNN}.ckpt`, `FOLDER/backbone.{safetensors,json}` and, for a method
    with a classifier, `FOLDER/head.safetensors`.

    Lightning calls a `Checkpoint` after all other callbacks, so the scores of the same epoch are known.

    A signal that any rank notes in `signals` stops all ranks after the same step. `Stopped` is raised before the next
    step, because then the metrics of the last one are logged. After the last step of an epoch it is raised after the
    epoch's score, because a resumed run does not compute that score.

    Args:
        cfg: when to save.
        monitor: the logged metric that `best` follows, higher is better; None saves no best.
        max_minutes: training time, over all starts of the run, after which it ends with a checkpoint; None: no limit.
        meta: further entries of backbone.json.
    """

    def __init__(
        self,
        folder: str | Path,
        cfg: SavingConfig,
        monitor: str | None = None,
        signals: Signals | None = None,
        max_minutes: float | None = None,
        **meta: object,
    ):
        self.folder, self.cfg, self.monitor, self.signals, self.meta = Path(folder), cfg, monitor, signals, meta
        self.max_minutes = max_minutes
        self.best: float | None = None
        self.saved_at = self.started = time.monotonic()
        self.seconds_before = 0.0  # of training, in earlier starts of the run
        self.saved_step = self.seen_step = 0
        self.signal = 0  # the one that all ranks stop for
        self.late = False  # saving.every_minutes have passed since last.ckpt was written
        self.over = False  # max_minutes have passed
        self._answer: Callable[[], list[int]] | None = None

    def seconds(self) -> float:
        """Training time of all starts of the run."""
        return self.seconds_before + time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.seconds_before = state_dict["best"], state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.saved_at = self.started = time.monotonic()
        self.saved_step, self.seen_step = -1, trainer.global_step
        step = trainer.global_step
        most, least = distributed.largest([step, -step], module.device)()
        if most != -least:
            raise RuntimeError(
                f"ranks resume from different steps, {-least} to {most}: is run.output on a file system that all"
                " machines share?"
            )
        if self.max_minutes is not None:
            first_is_over = distributed.rank() == 0 and self._out_of_time()
            trainer.should_stop |= bool(distributed.largest([int(first_is_over)], module.device)()[0])
        if self.signals:
            self.signals.listen()  # here, because Lightning installs its own handlers just before
            stop_asking_for_sigterm(trainer)

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
        if not stepped:  # no saving or stopping between micro-batches, whose gradients no checkpoint holds
            trainer.should_stop = False
            return
        self._agree(module.device)
        if self.over:
            trainer.should_stop = True
        if trainer.is_last_batch:  # saved after the epoch's score, because a resumed run does not compute that score
            return
        # If training stops inside an epoch, then this is the last moment at which Lightning knows its position.
        if self._due(trainer) or self.signal or trainer.should_stop or trainer.global_step == trainer.max_steps:
            self.save(trainer, "last")

    def _agree(self, device: torch.device) -> None:
        """Let the ranks agree on `signal`, `late` and `over`. Saving needs all ranks, but signals reach them at
        different moments, and only the clock of rank 0 counts.

        This happens in every step, because a signal may come seconds before the end. GPUs act on the answer of the step
        before, so that they do not wait for it.
        """
        minutes = self.cfg.every_minutes
        elapsed = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        first = distributed.rank() == 0
        flags = [self.signals.noted if self.signals else 0, int(first and elapsed), int(first and self._out_of_time())]
        answer: Callable[[], list[int]] | None = distributed.largest(flags, device)
        if device.type == "cuda" and distributed.active():
            answer, self._answer = self._answer, answer
        self.signal, late, over = answer() if answer is not None else (0, 0, 0)
        self.late, self.over = bool(late), bool(over)

    def _out_of_time(self) -> bool:
        return self.max_minutes is not None and self.seconds() >= 60 * self.max_minutes

    def _due(self, trainer: pl.Trainer) -> bool:
        steps = self.cfg.every_steps
        return self.late or (steps is not None and trainer.global_step % steps == 0)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        done = trainer.current_epoch + 1
        score = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # callback_metrics may still hold the score of an earlier epoch. It is not above the best, so nothing happens.
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
        """Write a checkpoint beside its final place, then move it there in one step.

        Raises:
            RuntimeError: the weights are not finite, or the file cannot be written. The old checkpoint stays.
        """
        sums = torch.stack(
            [distributed.own_part(parameter).float().sum() for parameter in trainer.lightning_module.parameters()]
        )
        if not torch.isfinite(distributed.mean_over_ranks(sums)).all():  # tested together, so that all ranks stop
            raise RuntimeError(
                f"the weights are not finite at step {trainer.global_step}; {name}.ckpt stays as it was. "
                "Lower optim.lr, or train with trainer.precision=fp32."
            )
        path = self.folder / "checkpoints" / f"{name}.ckpt"
        partial = path.with_name(path.name + PARTIAL)
        try:
            trainer.save_checkpoint(partial, weights_only=False)  # with the optimizer and the loops
            if trainer.is_global_zero:
                put_in_place(partial, path)
        except (OSError, RuntimeError) as error:  # torch's writer answers a full disk with RuntimeError
            raise not_written(path, partial, error, trainer.global_step) from error
        if name == "last":
            self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
            self._answer = None  # its clock has just been reset, and its signal is asked for again

    def export(self, trainer: pl.Trainer, module: Any) -> None:
        """Write the evaluated backbone (the teacher's for DINO), and its head if there is one. All ranks call this."""
        module = module.whole("evaluation_backbone", "evaluation_head")
        if trainer.is_global_zero:
            at = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            digest = save_backbone(
                module.evaluation_backbone(), self.folder, module.mean, module.std, **at, **self.meta
            )
            head = module.evaluation_head()
            if head is not None:
                save_head(head, module.classes, self.folder, digest)


def stop_asking_for_sigterm(trainer: pl.Trainer) -> None:
    """Replace the function by which Lightning tells all ranks of a SIGTERM before every batch.

    GPUs would wait for it each time. It is not needed: our handler notes the signal, and the keeper tells the ranks.

    Raises:
        RuntimeError: this version of Lightning has no such function, so that ranks might stop at different steps.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    if not hasattr(loop, SIGTERM_BROADCAST):
        raise RuntimeError(
            f"pytorch-lightning {pl.__version__} has no {type(loop).__name__}.{SIGTERM_BROADCAST}, which vit-suite"
            " replaces: install a version that pyproject.toml of vit-suite allows."
        )
    setattr(loop, SIGTERM_BROADCAST, lambda: None)
