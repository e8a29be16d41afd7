"""Where a run logs: metrics.csv, and W&B beside it."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path

from pytorch_lightning.loggers import Logger, WandbLogger

from vit_suite.config import PretrainConfig
from vit_suite.errors import UserError
from vit_suite.files import write_atomically
from vit_suite.logs import main_process
from vit_suite.training.metrics import MetricsLogger

WANDB_ID = "wandb_id"
"""File in the run directory with the id of its W&B run, which a resumed run goes on with."""


def build_loggers(cfg: PretrainConfig, folder: Path, steps_done: int) -> list[Logger]:
    """The loggers of a run that writes into `folder`, where `steps_done` steps have been done before."""
    loggers: list[Logger] = [MetricsLogger(folder, steps_done)]
    if cfg.logger.wandb:
        check_wandb(cfg)
        known = folder / WANDB_ID
        run_id = known.read_text().strip() if known.is_file() and not cfg.run.overwrite else secrets.token_hex(4)
        place = {"project": cfg.logger.wandb_project, "offline": cfg.logger.wandb_offline, "save_dir": str(folder)}
        loggers.append(WandbLogger(name=cfg.run.name, id=run_id, resume="allow", config=asdict(cfg), **place))
    return loggers


def check_wandb(cfg: PretrainConfig) -> None:
    """UserError where W&B is not installed, or wants an account that this machine does not know."""
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
            write_atomically(folder / WANDB_ID, lambda path, text=f"{logger.version}\n": path.write_text(text))
