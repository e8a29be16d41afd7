"""`vit-suite pretrain`: data, method and trainer from a config; everything is checked before the run directory
appears."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

import pytorch_lightning as pl
import torch

from vit_suite import distributed
from vit_suite.attention.online import AttentionSnapshots
from vit_suite.commands import rundir
from vit_suite.commands.drill import drill_callbacks, run_drill
from vit_suite.commands.loggers import build_loggers, remember
from vit_suite.commands.logs import main_process, speak
from vit_suite.commands.start import adopt
from vit_suite.commands.stop import answer, cluster_environment, requeued
from vit_suite.commands.supervised import (
    check_test_labels,
    class_names,
    has_test,
    prepare_head,
    score_run,
    test_protocol,
)
from vit_suite.config import PretrainConfig, SiTConfig, SupervisedConfig, TrainerConfig
from vit_suite.data.decode import Quarantine
from vit_suite.data.gpu_decode import check_decoder
from vit_suite.data.module import ImageDataModule
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.classification import OnlineAccuracy
from vit_suite.evaluation.online import OnlineKNN, OnlineScore
from vit_suite.hardware import pick_device, pick_precision
from vit_suite.methods.base import Method
from vit_suite.methods.compiled import MarkSteps, check_compile, compile_blocks
from vit_suite.methods.ddp import OrderedDDP
from vit_suite.methods.dino import DINO
from vit_suite.methods.sharding import ShardedStrategy
from vit_suite.methods.sit import SiT
from vit_suite.methods.supervised import SupervisedViT
from vit_suite.reports.progress import PatientBar, Progress
from vit_suite.reports.results import append_result
from vit_suite.reports.sheets import COLUMNS, ReconstructionSheets
from vit_suite.signals import Signals, Stopped
from vit_suite.views.multicrop import ViewsInWorkers, pick_backend
from vit_suite.weights.checkpoint import load_backbone, weights_sha256
from vit_suite.weights.keeper import Keeper

log = logging.getLogger("vit_suite")

METHODS: dict[str, type[Method]] = {"dino": DINO, "sit": SiT, "supervised": SupervisedViT}


def run(cfg: PretrainConfig) -> None:
    """Train, or resume, the run of `cfg`, and say what to do next."""
    speak()
    if cfg.drill:
        if status := run_drill(cfg):
            raise SystemExit(status)
        return
    if train(cfg):
        root = f" --data.root {cfg.data.root}" if cfg.data.root else ""
        log.info(
            "next: vit-suite knn --checkpoint %s --data.name %s%s --baselines", cfg.run.output, cfg.data.name, root
        )
        log.info(
            "      vit-suite attention --checkpoint %s --images IMAGES --output %s/attention",
            cfg.run.output,
            cfg.run.output,
        )


class Run(NamedTuple):
    """A training that is ready to start."""

    cfg: PretrainConfig
    folder: Path
    trainer: pl.Trainer
    method: Method
    data: ImageDataModule
    scores: list[OnlineScore]
    progress: Progress
    device: torch.device
    precision: str
    checkpoint: Path | None
    """What it resumes from."""
    steps_before: int
    """Optimizer steps behind that."""


def train(cfg: PretrainConfig) -> bool:
    """Train, or resume; whether this process is the one that writes the results (rank 0).

    Raises:
        Stopped: a signal asked for it, and the checkpoint is saved (rank 0; the others just end).
    """
    if cfg.run.overwrite and requeued():
        cfg = replace(cfg, run=replace(cfg.run, overwrite=False))
    with Signals() as signals:
        run = prepare(cfg, signals)
        started = time.perf_counter()
        if not (run := fit(run)):
            return False
        record(run, time.perf_counter() - started)
        run.progress.write("done")
        return True


def prepare(cfg: PretrainConfig, signals: Signals) -> Run:
    """Everything of a run, checked; the run directory appears at the end."""
    start = load_backbone(cfg.method.start) if isinstance(cfg.method, SupervisedConfig) and cfg.method.start else None
    if start:
        cfg = adopt(cfg, start)
    folder = Path(cfg.run.output)
    main = main_process()
    checkpoint = rundir.check(cfg) if main or not cfg.run.overwrite else None
    steps_before = rundir.steps_done(checkpoint) if checkpoint else 0
    data, method, device, precision = build_parts(cfg, folder)
    if isinstance(method, SupervisedViT):
        prepare_head(method, start, checkpoint)
    scores = build_scores(cfg, data, precision)
    progress = build_progress(cfg, folder, data, scores, steps_before)
    callbacks = build_callbacks(cfg, folder, data, scores, precision, signals)
    callbacks += [
        progress,
        *drill_callbacks(steps_before, progress.max_steps),
    ]  # after the scores, which status.json shows
    trainer = build_trainer(cfg, folder, callbacks, precision, steps_before)
    data.trainer = trainer
    data.plan()  # says now whether the global batch splits over the ranks
    if main:
        rundir.create(cfg)
        remember(trainer.loggers, folder)
        data.quarantine.list_again()
        progress.write("running")
    return Run(cfg, folder, trainer, method, data, scores, progress, device, precision, checkpoint, steps_before)


def build_parts(
    cfg: PretrainConfig, folder: Path
) -> tuple[ImageDataModule, Method, torch.device, Literal["bf16", "fp32"]]:
    """Data and method of a training whose files lie in `folder`, seeded; its device and precision."""
    if cfg.trainer.max_steps == 0:
        raise UserError("trainer.max_steps is 0; expected at least 1, or -1 to let trainer.max_epochs decide.")
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    pl.seed_everything(cfg.run.seed, workers=True, verbose=False)
    device = pick_device(cfg.trainer.accelerator)
    precision = pick_precision(cfg.trainer.precision, device)
    check_compile(cfg.trainer, device)
    quarantine = Quarantine(folder / "quarantine.txt", cfg.data.max_corrupt)
    data = ImageDataModule(cfg.data, seed=cfg.run.seed, quarantine=quarantine, accumulate=cfg.trainer.accumulate)
    method = build_method(cfg, data)
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
    return data, method, device, precision


def check_decode(cfg: PretrainConfig, data: ImageDataModule, device: torch.device) -> None:
    """UserError where data.decode gpu has nothing to decode, or nothing to decode it with."""
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
    check_decoder(device)


def fit(run: Run) -> Run | None:
    """Train to the end; on rank 0 the run, with all weights where ranks shared them. Raises Stopped there, with
    status.json written, when a signal ended it before."""
    if run.checkpoint:
        log.info("resuming %s, %d steps done", run.checkpoint, run.steps_before)
    main = run.trainer.is_global_zero
    try:
        run.trainer.fit(run.method, run.data, ckpt_path=run.checkpoint, weights_only=True)
    except Stopped as stop:
        if not main:  # one rank speaks for all; a launcher that sees another fail first would end it before that
            return None
        run.progress.write("stopped", stop.signal.name)
        if bar := run.trainer.progress_bar_callback:
            bar.on_train_end(run.trainer, run.method)  # ends its line, which the message would go on
        raise answer(stop, run.cfg.run.overwrite) from None
    except BaseException as error:
        if main:
            run.progress.write("failed", " ".join(f"{type(error).__name__}: {error}".split())[:300])
        raise
    method = run.method.whole()
    return run._replace(method=method) if main else None


def record(run: Run, seconds: float) -> None:
    """Leave the results of a finished run; of one that was complete before, what a process that was killed at the end
    did not leave."""
    complete = run.checkpoint is not None and run.trainer.global_step == run.steps_before
    method = run.method.to(run.device)
    if complete and rundir.recorded(run.folder, weights_sha256(method.evaluation_backbone().vit.state_dict())):
        log.info("%s is complete: %d steps, nothing left to train.", run.folder, run.steps_before)
        log.info("A larger trainer.max_epochs, max_steps or max_minutes goes on; --run.overwrite starts anew.")
        if isinstance(method, SupervisedViT) and has_test(run.data):
            score_run(run.cfg, method, run.data, run.precision, run.folder)
        return
    if complete:
        run.trainer.checkpoint_callback.export(run.trainer, method)
    summarize(run, seconds)


def build_method(cfg: PretrainConfig, data: ImageDataModule) -> Method:
    """The LightningModule of `cfg.method`, sized for the data."""
    if cfg.method.name not in METHODS:
        raise unknown_name("method", cfg.method.name, METHODS)
    backbone = replace(cfg.backbone, channels=cfg.data.channels)
    classes = {"classes": class_names(data)} if cfg.method.name == "supervised" else {}
    return METHODS[cfg.method.name](
        cfg.method,
        backbone,
        cfg.views,
        cfg.optim,
        data.mean,
        data.std,
        seed=cfg.run.seed,
        batch_size=cfg.data.batch_size,
        **classes,
    )


def build_scores(cfg: PretrainConfig, data: ImageDataModule, precision: str) -> list[OnlineScore]:
    """Online scores, where they are wanted and the data has labels: kNN, and the accuracy of a supervised head. The
    last one decides which checkpoint is the best."""
    if not cfg.evaluate.every_epochs:
        return []
    if data.train_source.labels is None:
        log.info("%s has no labels: no kNN during training; the best checkpoint is the last", data.name)
        return []
    try:
        itself = data.scored_on_itself
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}, or train without scores: --evaluate.every_epochs 0.") from error
    if itself:
        log.info(
            "%s has no split of its own to score: no scores during training; the best checkpoint is the last", data.name
        )
        return []
    size = [cfg.views.global_size, cfg.views.global_size]
    scores: list[OnlineScore] = [OnlineKNN(cfg.evaluate, data, size, precision)]
    if cfg.method.name == "supervised":
        check_test_labels(data)
        scores.append(OnlineAccuracy(cfg.evaluate, data, size, precision))
    return scores


def build_progress(
    cfg: PretrainConfig, folder: Path, data: ImageDataModule, scores: Sequence[OnlineScore], steps_before: int
) -> Progress:
    """What keeps status.json."""
    per_epoch = len(data.plan()) // cfg.trainer.accumulate
    planned = per_epoch * cfg.trainer.max_epochs
    most = planned if cfg.trainer.max_steps == -1 else min(planned, cfg.trainer.max_steps)
    return Progress(folder, cfg.data.batch_size, per_epoch, most, steps_before, scores[0] if scores else None)


def build_callbacks(
    cfg: PretrainConfig,
    folder: Path,
    data: ImageDataModule,
    scores: Sequence[OnlineScore],
    precision: str,
    signals: Signals,
) -> list[pl.Callback]:
    """Checkpoints, scores and pictures of a run."""
    monitor = scores[-1].metric if scores else None
    keeper = Keeper(folder, cfg.checkpoint, monitor, signals, method=cfg.method.name, data=data.name, seed=cfg.run.seed)
    callbacks: list[pl.Callback] = [keeper, *scores]
    if isinstance(cfg.method, SiTConfig) and cfg.method.sheet_every_epochs and cfg.method.reconstruct != "none":
        sheets, shown = folder / "reconstructions", images_to_show(data, COLUMNS)
        callbacks.append(
            ReconstructionSheets(sheets, shown, cfg.views.global_size, cfg.method.sheet_every_epochs, precision)
        )
    if cfg.snapshots.every_epochs:
        shown = images_to_show(data, cfg.snapshots.images)
        callbacks.append(
            AttentionSnapshots(
                folder / "snapshots", shown, cfg.views.global_size, cfg.snapshots.every_epochs, precision
            )
        )
    return callbacks


def images_to_show(data: ImageDataModule, count: int) -> ImageSource:
    """Test images for pictures of the training; training images where the set has no other split."""
    try:
        return data.test(count)
    except UserError:
        return data.bank(count)


def build_trainer(
    cfg: PretrainConfig, folder: Path, callbacks: list[pl.Callback], precision: str, steps_done: int = 0
) -> pl.Trainer:
    """The Lightning trainer of a run that writes into `folder`, where `steps_done` steps have been done before."""
    options = replace(cfg.trainer, **layout(cfg.trainer))
    cuda = pick_device(options.accelerator).type == "cuda"
    if cuda and options.devices != "auto" and options.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices is {options.devices}, but torch sees {torch.cuda.device_count()} GPUs here.")
    devices = options.devices if options.devices != "auto" else torch.cuda.device_count() if cuda else 1
    if options.compile == "graphs":
        callbacks = [*callbacks, MarkSteps()]
    if cuda and options.progress:
        callbacks = [*callbacks, PatientBar(refresh_rate=options.log_every * options.accumulate)]
    return pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=devices,
        strategy=pick_strategy(options, devices * options.nodes, cuda),
        num_nodes=options.nodes,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        max_time=None if options.max_minutes is None else timedelta(minutes=options.max_minutes),
        accumulate_grad_batches=options.accumulate,
        log_every_n_steps=options.log_every,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        plugins=cluster_environment(),
        use_distributed_sampler=False,  # the data module slices the global batch itself
        num_sanity_val_steps=0,
        logger=build_loggers(cfg, folder, steps_done),
        callbacks=callbacks,
        default_root_dir=folder,
    )


def pick_strategy(options: TrainerConfig, ranks: int, cuda: bool) -> pl.strategies.Strategy | str:
    """How the ranks share a step."""
    if options.strategy == "fsdp2":
        return ShardedStrategy(ranks)
    return "auto" if cuda or ranks == 1 else OrderedDDP()


def layout(options: TrainerConfig) -> dict[str, int]:
    """`nodes` and `devices` where torchrun or srun started the processes: theirs. UserError where the options were
    given and differ."""
    found = distributed.started()
    if found is None:
        return {}
    nodes, devices = found
    if options.nodes not in (1, nodes) or options.devices not in ("auto", devices):
        raise UserError(
            f"trainer.nodes x trainer.devices is {options.nodes} x {options.devices}, but {nodes} x {devices} processes"
            " were started: leave both out, the launcher decides."
        )
    return {"nodes": nodes, "devices": devices}


def summarize(run: Run, seconds: float) -> None:
    """Append the run to results.json."""
    cfg, trainer, method = run.cfg, run.trainer, run.method
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
    protocol = {
        "method": cfg.method.name,
        "data": run.data.name,
        "knn": asdict(cfg.evaluate),
        "config": "config.yaml",
    }
    if isinstance(method, SupervisedViT) and has_test(run.data):
        metrics |= score_run(cfg, method, run.data, run.precision, run.folder)
        protocol["test"] = test_protocol(cfg, run.data, run.precision)
    task = "finetune" if isinstance(cfg.method, SupervisedConfig) and cfg.method.start else "pretrain"
    append_result(
        run.folder / "results.json",
        task,
        metrics,
        protocol,
        weights_sha256(method.evaluation_backbone().vit.state_dict()),
    )
    last = f", kNN {metrics['knn_top1']:.2f}%" if "knn_top1" in metrics else ""
    log.info("done: %d steps, %d images in %.0f s%s; %s", steps, images, seconds, last, run.folder)
