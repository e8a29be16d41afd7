"""Scores during training, and when to take them.

One of them picks the best checkpoint, because the loss of self-distillation does not (facebookresearch/dino issue 229).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
from PIL import Image

from vit_suite.config import EvaluateConfig, PretrainConfig
from vit_suite.config.limits import pair
from vit_suite.data.module import ImageDataModule
from vit_suite.errors import UserError
from vit_suite.evaluation.classification import classify
from vit_suite.evaluation.features import FeatureOptions, extract_features
from vit_suite.evaluation.knn import KNNOptions, knn_classify
from vit_suite.hardware import AskedPrecision
from vit_suite.methods.base import Method
from vit_suite.training.parts import Parts

log = logging.getLogger("vit_suite")


class OnlineScore(pl.Callback):
    """Scores the module every `every_epochs` epochs and after the last one, and logs the values of `score`, in percent.

    The test images are clean. They are drawn once, class by class, so that the scores of a run can be compared. Ranks
    share the work and get the same score, so that they agree on the best checkpoint, which has the highest `metric`.
    """

    metric: str

    def __init__(
        self, cfg: EvaluateConfig, data: ImageDataModule, image_size: Iterable[int], precision: AskedPrecision
    ):
        self.cfg, self.precision = cfg, precision
        self.image_size = list(image_size)
        self.test = data.test(cfg.test_size)
        self.history: list[tuple[int, float]] = []
        """(epochs done, `metric`)."""

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [tuple(entry) for entry in state_dict["history"]]

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not due(trainer, self.cfg.every_epochs):
            return
        scores = self.score(module)
        self.history.append((trainer.current_epoch + 1, scores[self.metric]))
        for name, value in scores.items():
            module.log(name, value, prog_bar=name == self.metric, sync_dist=True)

    def score(self, module: Method) -> dict[str, float]:
        """Name -> percent; `metric` is among the names."""
        raise NotImplementedError


class OnlineKNN(OnlineScore):
    """Weighted kNN of the method's evaluation backbone, `knn/top1`. The bank has clean training images, drawn once."""

    metric = "knn/top1"

    def __init__(
        self, cfg: EvaluateConfig, data: ImageDataModule, image_size: Iterable[int], precision: AskedPrecision
    ):
        super().__init__(cfg, data, image_size, precision)
        self.bank = data.bank(cfg.bank_size)

    def score(self, module: Method) -> dict[str, float]:
        options = FeatureOptions(self.cfg.batch_size, module.device, self.precision)
        view = self.image_size, module.mean, module.std
        backbone = module.whole("evaluation_backbone").evaluation_backbone()
        bank = extract_features(backbone, self.bank, *view, replace(options, shared=True))
        test = extract_features(backbone, self.test, *view, options)
        vote = KNNOptions(ks=[self.cfg.k], temperature=self.cfg.temperature, device=module.device)
        return {self.metric: knn_classify(*bank[:2], *test[:2], options=vote, rows=bank.rows).top1[self.cfg.k]}


class OnlineAccuracy(OnlineScore):
    """Top-1 and top-5 of the method's classifier, `val/top1` and `val/top5`.

    Raises:
        UserError: the scored split has no labels.
    """

    metric = "val/top1"

    def __init__(
        self, cfg: EvaluateConfig, data: ImageDataModule, image_size: Iterable[int], precision: AskedPrecision
    ):
        test = data.test_source
        if test.labels is None or not bool((test.labels >= 0).any()):
            raise UserError(
                f"split '{test.split}' of {data.name} has no labels to score: train without scores,"
                " --evaluate.every_epochs 0."
            )
        super().__init__(cfg, data, image_size, precision)

    def score(self, module: Method) -> dict[str, float]:
        found = classify(module.whole("classifier"), self.test, self.image_size, self.cfg.batch_size, self.precision)
        return {self.metric: found.top1, "val/top5": found.top5}


SCORES: dict[str, type[OnlineScore]] = {"knn": OnlineKNN, "accuracy": OnlineAccuracy}
"""Name in `Method.online_scores` -> the callback. A new score is one class and one row here."""


def build_scores(cfg: PretrainConfig, parts: Parts) -> list[OnlineScore]:
    """The scores that the method names, if the options ask for scores and the data has labels. The last one picks the
    best checkpoint."""
    data = parts.data
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
    size = list(pair(cfg.views.global_size))
    return [SCORES[name](cfg.evaluate, data, size, parts.precision) for name in parts.method.online_scores]


def due(trainer: pl.Trainer, every_epochs: int) -> bool:
    """Whether the epoch that just ended is scored: every `every_epochs`-th, and the last."""
    done = trainer.current_epoch + 1
    last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
    return not done % every_epochs or last


def show(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Give a picture to the loggers that take pictures (W&B, TensorBoard)."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [picture], step=trainer.global_step)
