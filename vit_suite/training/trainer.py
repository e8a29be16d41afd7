"""The Lightning trainer of a run: devices, strategy, precision, length, loggers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vit_suite import distributed
from vit_suite.config import PretrainConfig, TrainerConfig
from vit_suite.errors import UserError
from vit_suite.hardware import pick_device
from vit_suite.methods.compiled import MarkSteps
from vit_suite.methods.ddp import OrderedDDP, QuietDDP
from vit_suite.methods.sharding import ShardedStrategy
from vit_suite.training.loggers import build_loggers
from vit_suite.training.progress import PatientBar, on_terminal
from vit_suite.training.stop import cluster_environment


def build_trainer(
    cfg: PretrainConfig, folder: Path, callbacks: list[pl.Callback], precision: str, steps_done: int = 0
) -> pl.Trainer:
    """The Lightning trainer of a run that writes into `folder` and resumes after `steps_done` steps."""
    found: dict[str, Any] = dict(layout(cfg.trainer))
    options = replace(cfg.trainer, **found)
    cuda = pick_device(options.accelerator).type == "cuda"
    if cuda and options.devices != "auto" and options.devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices is {options.devices}, but torch sees {torch.cuda.device_count()} GPUs here.")
    devices = options.devices if options.devices != "auto" else torch.cuda.device_count() if cuda else 1
    if options.compile == "graphs":
        callbacks = [*callbacks, MarkSteps()]
    bar = options.progress and on_terminal()
    if cuda and bar:
        callbacks = [*callbacks, PatientBar(refresh_rate=options.log_every * options.accumulate)]
    return pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=devices,
        strategy=pick_strategy(options, devices * options.nodes, cuda),
        num_nodes=options.nodes,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=options.max_epochs,
        max_steps=options.max_steps,
        accumulate_grad_batches=options.accumulate,
        log_every_n_steps=options.log_every,
        enable_progress_bar=bar,
        enable_model_summary=False,
        plugins=[*cluster_environment()],
        use_distributed_sampler=False,  # the data module divides the global batch itself
        num_sanity_val_steps=0,
        logger=build_loggers(cfg, folder, steps_done),
        callbacks=callbacks,
        default_root_dir=folder,
    )


def pick_strategy(options: TrainerConfig, ranks: int, cuda: bool) -> pl.strategies.Strategy | str:
    """How the ranks share a step."""
    if options.strategy == "fsdp2":
        return ShardedStrategy(ranks)
    if ranks == 1:
        return "auto"
    return QuietDDP() if cuda else OrderedDDP()


def layout(options: TrainerConfig) -> dict[str, int]:
    """`nodes` and `devices` as torchrun or srun started the processes; empty without them.

    Raises:
        UserError: the options ask for other numbers.
    """
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
