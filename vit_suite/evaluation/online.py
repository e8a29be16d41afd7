"""Weighted kNN during training: the score that picks the best checkpoint (dino#229: the loss does not)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl

from vit_suite.config import EvaluateConfig
from vit_suite.data.module import ImageDataModule
from vit_suite.evaluation.features import extract_features
from vit_suite.evaluation.knn import knn_classify


class OnlineKNN(pl.Callback):
    """Every `every_epochs` epochs and after the last one, scores the method's evaluation backbone; logs `knn/top1` in percent.

    Bank and queries are clean (no augmentation), drawn once, class by class, so that the scores of a run compare.
    Ranks share the work and all get the same score, so that they agree on the best checkpoint.
    """

    metric = "knn/top1"

    def __init__(self, cfg: EvaluateConfig, data: ImageDataModule, image_size: Iterable[int], precision: str):
        self.cfg, self.precision = cfg, precision
        self.image_size = list(image_size)
        self.bank, self.test = data.bank(cfg.bank_size), data.test(cfg.test_size)
        self.history: list[tuple[int, float]] = []
        """(epochs done, top-1 in percent)."""

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [tuple(entry) for entry in state_dict["history"]]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not due(trainer, self.cfg.every_epochs):
            return
        score = self.score(module)
        self.history.append((trainer.current_epoch + 1, score))
        module.log(self.metric, score, prog_bar=True, sync_dist=True)

    def score(self, module: pl.LightningModule) -> float:
        """Top-1 in percent of the module's evaluation backbone."""
        options = {"batch_size": self.cfg.batch_size, "device": module.device, "precision": self.precision}
        backbone = module.whole().evaluation_backbone()
        bank = extract_features(backbone, self.bank, self.image_size, module.mean, module.std, shared=True, **options)
        test = extract_features(backbone, self.test, self.image_size, module.mean, module.std, **options)
        vote = {"ks": [self.cfg.k], "temperature": self.cfg.temperature, "device": module.device}
        return knn_classify(*bank[:2], *test[:2], rows=bank.rows, **vote).top1[self.cfg.k]


def due(trainer: pl.Trainer, every_epochs: int) -> bool:
    """Whether the epoch that ends is to be scored: one of every so many, and the last."""
    done = trainer.current_epoch + 1
    last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
    return not done % every_epochs or last
