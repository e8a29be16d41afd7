"""The callbacks of a run: checkpoints, scores, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vit_suite.config import PretrainConfig
from vit_suite.config.limits import pair
from vit_suite.data.module import ImageDataModule
from vit_suite.data.source import ImageSource
from vit_suite.errors import UserError
from vit_suite.signals import Signals
from vit_suite.training.keeper import Keeper
from vit_suite.training.parts import Parts
from vit_suite.training.scores import OnlineScore
from vit_suite.training.sheets import COLUMNS, Sheets
from vit_suite.training.snapshots import AttentionSnapshots


def build_callbacks(
    cfg: PretrainConfig, folder: Path, parts: Parts, scores: Sequence[OnlineScore], signals: Signals
) -> list[pl.Callback]:
    """The callbacks of a run that writes into `folder`: checkpoints, scores, pictures. The last score picks the best
    checkpoint."""
    data, method, precision = parts.data, parts.method, parts.precision
    size = pair(cfg.views.global_size)
    monitor = scores[-1].metric if scores else None
    meta: dict[str, Any] = {"method": cfg.method.name, "data": data.name, "seed": cfg.run.seed, **parts.origin}
    keeper = Keeper(folder, cfg.saving, monitor, signals, cfg.trainer.max_minutes, **meta)
    callbacks: list[pl.Callback] = [keeper, *scores]
    if every := method.sheet_every_epochs:
        shown = images_to_show(data, COLUMNS)
        callbacks.append(Sheets(folder / "reconstructions", shown, size, every, precision))
    if every := cfg.snapshots.every_epochs:
        shown = images_to_show(data, cfg.snapshots.images)
        callbacks.append(AttentionSnapshots(folder / "snapshots", shown, size, every, precision))
    return callbacks


def images_to_show(data: ImageDataModule, count: int) -> ImageSource:
    """Test images for pictures of the training; training images if the data has no other split."""
    try:
        return data.test(count)
    except UserError:
        return data.bank(count)
