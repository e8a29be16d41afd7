"""`vit-suite pretrain`: data, method and trainer from a config; everything is checked before the run directory appears."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger

from vit_suite.attention.online import AttentionSnapshots
from vit_suite.commands import rundir
from vit_suite.commands.logs import main_process, speak
from vit_suite.commands.start import adopt
from vit_suite.commands.supervised import check_test_labels, class_names, has_test, prepare_head, score_run, test_protocol
from vit_suite.config import PretrainConfig, SiTConfig, SupervisedConfig
from vit_suite.data.decode import Quarantine
from vit_suite.data.module import ImageDataModule
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError, unknown_name
from vit_suite.evaluation.classification import OnlineAccuracy
from vit_suite.evaluation.online import OnlineKNN
from vit_suite.hardware import pick_device, pick_precision
from vit_suite.methods.base import Method
from vit_suite.methods.dino import DINO
from vit_suite.methods.sit import SiT
from vit_suite.methods.supervised import SupervisedViT
from vit_suite.reports.metrics import MetricsLogger
from vit_suite.reports.results import append_result
from vit_suite.reports.sheets import COLUMNS, ReconstructionSheets
from vit_suite.views.multicrop import ViewsInWorkers, pick_backend
from vit_suite.weights.checkpoint import load_backbone, weights_sha256
from vit_suite.weights.keeper import Keeper

log = logging.getLogger("vit_suite")

METHODS: dict[str, type[Method]] = {"dino": DINO, "sit": SiT, "supervised": SupervisedViT}
Score = OnlineKNN | OnlineAccuracy


def run(cfg: PretrainConfig) -> None:
    """Train, or resume, the run of `cfg`, and say what to do next."""
    speak()
    if train(cfg):
        root = f" --data.root {cfg.data.root}" if cfg.data.root else ""
        log.info("next: vit-suite knn --checkpoint %s --data.name %s%s --baselines", cfg.run.output, cfg.data.name, root)
        log.info("      vit-suite attention --checkpoint %s --images IMAGES --output %s/attention", cfg.run.output, cfg.run.output)


def train(cfg: PretrainConfig) -> bool:
    """Train, or resume; whether this process is the one that writes the results (rank 0)."""
    start = load_backbone(cfg.method.start) if isinstance(cfg.method, SupervisedConfig) and cfg.method.start else None
    if start:
        cfg = adopt(cfg, start)
    folder = Path(cfg.run.output)
    main = main_process()
    checkpoint = rundir.check(cfg) if main or not cfg.run.overwrite else None
    steps_before = rundir.steps_done(checkpoint) if checkpoint else 0
    if cfg.trainer.max_steps == 0:
        raise UserError("trainer.max_steps is 0; expected at least 1, or -1 to let trainer.max_epochs decide.")
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    pl.seed_everything(cfg.run.seed, workers=True, verbose=False)
    device = pick_device(cfg.trainer.accelerator)
    precision = pick_precision(cfg.trainer.precision, device)
    data = ImageDataModule(
        cfg.data,
        seed=cfg.run.seed,
        quarantine=Quarantine(folder / "quarantine.txt", cfg.data.max_corrupt),
        accumulate=cfg.trainer.accumulate,
    )
    method = build_method(cfg, data)
    if isinstance(method, SupervisedViT):
        prepare_head(method, start, checkpoint)
    data.setup("fit")
    scores = build_scores(cfg, data, precision)
    callbacks = build_callbacks(cfg, folder, data, scores, precision)
    trainer = build_trainer(cfg, folder, callbacks, precision, steps_before)
    data.trainer = trainer
    data.plan()  # says now whether the global batch splits over the ranks
    if data.resident and cfg.views.backend == "workers":
        raise UserError("views.backend is workers, but the images are held in memory and no worker reads them: add --data.resident false.")
    if not data.resident and pick_backend(cfg.views, device.type, ragged=True) == "workers":
        data.transform = ViewsInWorkers(method.views, cfg.run.seed, cfg.data.batch_size)
    if main:
        rundir.create(cfg)
        data.quarantine.list_again()
    if checkpoint:
        log.info("resuming %s, %d steps done", checkpoint, steps_before)
    started = time.perf_counter()
    trainer.fit(method, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if checkpoint and trainer.global_step == steps_before:
        log.info("%s is complete: %d steps, nothing left to train.", folder, steps_before)
        log.info("A larger trainer.max_epochs, max_steps or max_minutes goes on; --run.overwrite starts anew.")
        if trainer.is_global_zero and isinstance(method, SupervisedViT) and has_test(data):
            score_run(cfg, method.to(device), data, precision, folder)
    elif trainer.is_global_zero:
        summarise(cfg, folder, trainer, method.to(device), scores, data, precision, time.perf_counter() - started)
    return trainer.is_global_zero


def build_method(cfg: PretrainConfig, data: ImageDataModule) -> Method:
    """The LightningModule of `cfg.method`, sized for the data."""
    if cfg.method.name not in METHODS:
        raise unknown_name("method", cfg.method.name, METHODS)
    backbone = replace(cfg.backbone, channels=cfg.data.channels)
    classes = {"classes": class_names(data)} if cfg.method.name == "supervised" else {}
    return METHODS[cfg.method.name](
        cfg.method, backbone, cfg.views, cfg.optim, data.mean, data.std, seed=cfg.run.seed, batch_size=cfg.data.batch_size, **classes
    )


def build_scores(cfg: PretrainConfig, data: ImageDataModule, precision: str) -> list[Score]:
    """Online scores, where they are wanted and the data has labels: kNN, and the accuracy of a supervised head. The last one decides
    which checkpoint is the best."""
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
        log.info("%s has no split of its own to score: no scores during training; the best checkpoint is the last", data.name)
        return []
    size = [cfg.views.global_size, cfg.views.global_size]
    scores: list[Score] = [OnlineKNN(cfg.evaluate, data, size, precision)]
    if cfg.method.name == "supervised":
        check_test_labels(data)
        scores.append(OnlineAccuracy(cfg.evaluate, data, size, precision))
    return scores


def build_callbacks(
    cfg: PretrainConfig, folder: Path, data: ImageDataModule, scores: Sequence[Score], precision: str
) -> list[pl.Callback]:
    """Checkpoints, scores and pictures of a run."""
    monitor = scores[-1].metric if scores else None
    keeper = Keeper(folder, cfg.checkpoint, monitor, method=cfg.method.name, data=data.name, seed=cfg.run.seed)
    callbacks: list[pl.Callback] = [keeper, *scores]
    if isinstance(cfg.method, SiTConfig) and cfg.method.sheet_every_epochs and cfg.method.reconstruct != "none":
        sheets, shown = folder / "reconstructions", images_to_show(data, COLUMNS)
        callbacks.append(ReconstructionSheets(sheets, shown, cfg.views.global_size, cfg.method.sheet_every_epochs, precision))
    if cfg.snapshots.every_epochs:
        shown = images_to_show(data, cfg.snapshots.images)
        callbacks.append(AttentionSnapshots(folder / "snapshots", shown, cfg.views.global_size, cfg.snapshots.every_epochs, precision))
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
    options = cfg.trainer
    cuda = pick_device(options.accelerator).type == "cuda"
    if cuda and options.devices != "auto" and options.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices is {options.devices}, but torch sees {torch.cuda.device_count()} GPUs here.")
    return pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=options.devices if options.devices != "auto" or torch.cuda.is_available() else 1,
        num_nodes=options.nodes,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        max_time=None if options.max_minutes is None else timedelta(minutes=options.max_minutes),
        accumulate_grad_batches=options.accumulate,
        log_every_n_steps=options.log_every,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        sync_batchnorm=cuda,  # torch has it for GPUs alone
        use_distributed_sampler=False,  # the data module slices the global batch itself
        num_sanity_val_steps=0,
        logger=build_loggers(cfg, folder, steps_done),
        callbacks=callbacks,
        default_root_dir=folder,
    )


def build_loggers(cfg: PretrainConfig, folder: Path, steps_done: int) -> list[Logger]:
    """metrics.csv, and W&B when asked for."""
    loggers: list[Logger] = [MetricsLogger(folder, steps_done)]
    if cfg.logger.wandb:
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
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(
            WandbLogger(name=cfg.run.name, project=cfg.logger.wandb_project, offline=cfg.logger.wandb_offline, save_dir=str(folder))
        )
    return loggers


def summarise(
    cfg: PretrainConfig,
    folder: Path,
    trainer: pl.Trainer,
    method: Method,
    scores: Sequence[Score],
    data: ImageDataModule,
    precision: str,
    seconds: float,
) -> None:
    """Append the run to results.json."""
    steps, images = trainer.global_step, trainer.global_step * cfg.data.batch_size
    metrics: dict[str, object] = {"steps": steps, "epochs": trainer.current_epoch, "images": images, "seconds": round(seconds, 1)}
    for score in scores:
        if score.history:
            name = score.metric.replace("/", "_")
            metrics |= {name: score.history[-1][1], f"{name}_by_epoch": score.history}
    protocol = {
        "method": cfg.method.name,
        "data": data.name,
        "knn": asdict(cfg.evaluate),
        "config": "config.yaml",
    }
    if isinstance(method, SupervisedViT) and has_test(data):
        metrics |= score_run(cfg, method, data, precision, folder)
        protocol["test"] = test_protocol(cfg, data, precision)
    task = "finetune" if isinstance(cfg.method, SupervisedConfig) and cfg.method.start else "pretrain"
    append_result(folder / "results.json", task, metrics, protocol, weights_sha256(method.evaluation_backbone().vit.state_dict()))
    last = f", kNN {metrics['knn_top1']:.2f}%" if "knn_top1" in metrics else ""
    log.info("done: %d steps, %d images in %.0f s%s; %s", steps, images, seconds, last, folder)
