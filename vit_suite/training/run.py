"""A training from its config to its results: prepared, run or resumed, recorded.

Everything is checked before the run directory appears.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from vit_suite import distributed
from vit_suite.config import PretrainConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import counted
from vit_suite.logs import main_process
from vit_suite.models.lora import merged, trained_share
from vit_suite.reports.about import write_about
from vit_suite.reports.report import write_report
from vit_suite.reports.results import append_result
from vit_suite.signals import Signals, Stopped
from vit_suite.training import checkup, rundir
from vit_suite.training.callbacks import build_callbacks
from vit_suite.training.drill import drill_callbacks
from vit_suite.training.final import score_test, test_protocol
from vit_suite.training.forecast import Forecast
from vit_suite.training.lock import held
from vit_suite.training.loggers import remember
from vit_suite.training.parts import Parts, build_parts
from vit_suite.training.progress import Length, Progress, on_terminal
from vit_suite.training.scores import OnlineScore, build_scores
from vit_suite.training.start import adopt, check_start, origin_of, take_weights
from vit_suite.training.stop import answer, requeued
from vit_suite.training.together import NO_FAILURE, FailTogether, note_before_start
from vit_suite.training.trainer import build_trainer
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone, weights_sha256
from vit_suite.weights.heads import take_heads

log = logging.getLogger("vit_suite")

REPORTED = 300
"""Test images on the map in the report of a finished training. `vit-suite report` shows more."""


class Run(NamedTuple):
    """A training that is ready to start."""

    cfg: PretrainConfig
    folder: Path
    parts: Parts
    trainer: pl.Trainer
    scores: list[OnlineScore]
    progress: Progress
    together: FailTogether
    start: LoadedBackbone | None
    """The checkpoint that `cfg.start` names, as it was before training."""
    checkpoint: Path | None
    """The checkpoint of this run that it resumes from."""
    steps_before: int
    """Optimizer steps done at that checkpoint."""


def train(cfg: PretrainConfig, start: LoadedBackbone | None = None) -> Path | None:
    """Train, or resume, the run of `cfg`.

    Args:
        start: the checkpoint that `cfg.start` names, if the caller has read it already.

    Returns:
        The run directory, on the process that writes it (rank 0); None on the other ranks.

    Raises:
        UserError: the config contradicts itself, the data, the machine or the content of run.output. Nothing is
            written.
        Stopped: a signal ended the training, and the checkpoint is saved (on rank 0; the other ranks return).
    """
    if cfg.run.overwrite and requeued():
        cfg = replace(cfg, run=replace(cfg.run, overwrite=False))
    with Signals() as signals, ExitStack() as stack:
        fresh = [path for path in (Path(cfg.run.output), *Path(cfg.run.output).parents) if not path.exists()]
        for path in reversed(fresh) if main_process() else []:
            stack.callback(_remove_empty, path)  # a user's error leaves nothing behind
        try:
            run = prepare(cfg, start, signals, stack)
        except NO_FAILURE:
            raise
        except BaseException as error:
            if not main_process():
                note_before_start(Path(cfg.run.output), error)
            raise
        started = time.perf_counter()
        finished = fit(run)
        if finished is None:
            return None
        run, scores = finished
        if not run.trainer.is_global_zero:
            return None
        record(run, scores, time.perf_counter() - started)
        run.progress.write("done")
        return run.folder


def prepare(cfg: PretrainConfig, start: LoadedBackbone | None, signals: Signals, stack: ExitStack) -> Run:
    """Build and check everything of a run. The run directory appears at the end; its lock is held until `stack`
    closes."""
    check_start(cfg)
    if cfg.start:
        start = start or load_backbone(cfg.start, cfg)
        cfg = adopt(cfg, start)
    folder = Path(cfg.run.output)
    main = main_process()
    checkpoint = rundir.check(cfg) if main or not cfg.run.overwrite else None
    steps_before = rundir.steps_done(checkpoint) if checkpoint else 0
    parts = build_parts(cfg, folder)._replace(origin=origin_of(start))
    take_weights(parts.method, start, checkpoint)
    if cfg.start_heads and cfg.start and checkpoint is None:
        log.info("%d heads taken from %s", take_heads(parts.method, cfg.start), cfg.start)
    if cfg.backbone.lora_rank:
        share = trained_share(parts.method.trained())
        log.info("LoRA of rank %d: %.1f%% of the student's parameters learn", cfg.backbone.lora_rank, 100 * share)
    scores = build_scores(cfg, parts)
    progress = build_progress(cfg, folder, parts.data, scores, steps_before)
    callbacks = build_callbacks(cfg, folder, parts, scores, signals)
    together = FailTogether(progress, fresh=checkpoint is None)
    # The progress comes after the scores, which status.json shows.
    callbacks += [progress, together, *drill_callbacks(steps_before, progress.length.max_steps)]
    if cfg.trainer.progress and checkpoint is None:
        limits = cfg.trainer.accumulate, cfg.trainer.max_minutes
        callbacks.append(Forecast(parts.data.train_source, progress.length, *limits))
    trainer = build_trainer(cfg, folder, callbacks, parts.precision, steps_before)
    lightning: Any = trainer
    lightning.profiler = progress.clock
    lightning.log_every_n_steps = shortest_interval(cfg.trainer.log_every, progress.length)
    parts.data.trainer = trainer
    parts.data.plan()  # says now whether the global batch splits over the ranks
    if main and checkpoint is None:
        for finding in checkup.of_run(cfg, parts.data, parts.method, trainer.world_size):
            if finding.level != "ok":
                log.warning("%s", finding)
    if checkpoint and main:
        rundir.check_images(folder, parts.data.train_source)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(folder))
        rundir.create(cfg)
        if checkpoint is None:
            write_about(folder, parts.data.train_source, trainer.world_size, parts.origin)
        remember(trainer.loggers, folder)
        parts.data.quarantine.list_again()
        progress.write("running")
    return Run(cfg, folder, parts, trainer, scores, progress, together, start, checkpoint, steps_before)


def shortest_interval(log_every: int, length: Length) -> int:
    """Optimizer steps between two log entries: `log_every`, or the steps of an epoch where those are fewer. A small set
    then gets a row of metrics.csv an epoch, and Lightning has no reason to warn that it logs nothing."""
    return max(1, min(log_every, length.steps_per_epoch, length.max_steps))


def build_progress(
    cfg: PretrainConfig, folder: Path, data: ImageDataModule, scores: Sequence[OnlineScore], steps_before: int
) -> Progress:
    """The callback that writes status.json, and lines into the log where there is no terminal for a progress bar."""
    per_epoch = len(data.plan()) // cfg.trainer.accumulate
    planned = per_epoch * cfg.trainer.max_epochs
    most = planned if cfg.trainer.max_steps == -1 else min(planned, cfg.trainer.max_steps)
    length = Length(cfg.data.batch_size, per_epoch, most)
    lines = cfg.trainer.line_every if cfg.trainer.progress and not on_terminal() else None
    return Progress(folder, length, steps_before, scores[0] if scores else None, lines)


def fit(run: Run) -> tuple[Run, dict[str, float]] | None:
    """Train to the end, and score a classifier on the whole test set. All ranks do both.

    Returns:
        The run, with all weights of the evaluated networks where ranks shared them, and the scores. None on other ranks
        than the first when a signal stopped the run.

    Raises:
        Stopped: a signal ended the run before (on rank 0); status.json says so.
    """
    if run.checkpoint:
        log.info("resuming %s, %d steps done", run.checkpoint, run.steps_before)
    main, method = run.trainer.is_global_zero, run.parts.method
    try:
        run.trainer.fit(method, run.parts.data, ckpt_path=run.checkpoint, weights_only=True)
        whole = method.whole("evaluation_backbone", "classifier", "evaluation_head")
        whole = whole.to(run.parts.device) if whole is method else whole  # Lightning left it on the CPU
        run = run._replace(parts=run.parts._replace(method=whole))
        return run, score_test(run.cfg, run.parts, run.folder)
    except Stopped as stop:
        if not main:  # rank 0 speaks for all; a launcher that saw another rank fail first would end it before that
            return None
        run.progress.write("stopped", stop.signal.name)
        if bar := run.trainer.progress_bar_callback:
            bar.on_train_end(run.trainer, method)  # ends the line of the bar before the message
        raise answer(stop, run.cfg.run.overwrite) from None
    except BaseException as error:
        if distributed.active() and not isinstance(error, NO_FAILURE):
            run.together.end_all(run.trainer, error)
        elif main:
            run.together.note(run.trainer, error)
        if (explained := run.together.explained(error)) is not error:
            raise explained from error
        raise


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def record(run: Run, scores: dict[str, float], seconds: float) -> None:
    """Write the results of a finished run. `scores` are those of its classifier on the test set.

    For a run that was complete before it started, write only what is missing because a process was killed at the end.
    """
    complete = run.checkpoint is not None and run.trainer.global_step == run.steps_before
    method = run.parts.method
    if complete and rundir.recorded(run.folder, weights_sha256(merged(method.evaluation_backbone()).vit.state_dict())):
        log.info("%s is complete: %s, nothing left to train.", run.folder, counted(run.steps_before, "step"))
        log.info("A larger trainer.max_epochs, max_steps or max_minutes goes on; --run.overwrite starts anew.")
        return
    if complete:
        keeper: Any = run.trainer.checkpoint_callback
        keeper.export(run.trainer, method)
    summarize(run, scores, seconds)
    if run.cfg.run.report:
        run.progress.write("done")  # which the report shows
        report(run.folder)


def report(folder: Path) -> None:
    """Write `folder/report.html`. A failure is only logged, because the training itself is done."""
    try:
        with distributed.apart():
            path = write_report(folder, images=REPORTED, further=False)
    except Exception as error:
        log.warning("no report (%s); `vit-suite report %s` tries again", " ".join(str(error).split())[:200], folder)
    else:
        log.info("report: %s", path)


def summarize(run: Run, scores: dict[str, float], seconds: float) -> None:
    """Append the run to results.json."""
    cfg, trainer, data, method = run.cfg, run.trainer, run.parts.data, run.parts.method
    steps, images = trainer.global_step, trainer.global_step * cfg.data.batch_size
    metrics: dict[str, object] = {
        "steps": steps,
        "epochs": trainer.current_epoch,
        "images": images,
        "seconds": round(seconds, 1),
    }
    for score in run.scores:
        if score.history:
            name = score.metric.replace("/", "_")
            metrics |= {name: score.history[-1][1], f"{name}_by_epoch": score.history}
    protocol: dict[str, object] = {
        "method": cfg.method.name,
        "data": data.name,
        "knn": asdict(cfg.evaluate),
        "config": rundir.CONFIG,
    }
    if run.start:
        protocol |= {"start": cfg.start, "start_sha256": run.start.sha256}
    if scores:
        metrics |= scores
        protocol["test"] = test_protocol(cfg, run.parts)
    task = "finetune" if run.start and method.classifier() else "pretrain"
    sha256 = weights_sha256(merged(method.evaluation_backbone()).vit.state_dict())
    append_result(run.folder / "results.json", task, metrics, protocol, sha256)
    last = f", kNN {metrics['knn_top1']:.2f}%" if "knn_top1" in metrics else ""
    done = f"{counted(steps, 'step')}, {counted(images, 'image')}"
    log.info("done: %s in %.0f s%s; %s", done, seconds, last, run.folder)
