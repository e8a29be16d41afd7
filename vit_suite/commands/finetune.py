"""`vit-suite finetune`: supervised training of a checkpoint's backbone under a fresh head."""

from __future__ import annotations

from dataclasses import asdict, fields

from vit_suite.commands.pretrain import say_next
from vit_suite.config import FinetuneConfig, PretrainConfig, ReadingConfig, SupervisedViewsConfig
from vit_suite.config.limits import one_or_two, pair
from vit_suite.logs import speak
from vit_suite.training.run import train
from vit_suite.weights.checkpoint import LoadedBackbone, load_backbone


def run(cfg: FinetuneConfig) -> None:
    """Fine-tune, or resume, leave the scores in the run directory, and say what to do next."""
    speak()
    start = load_backbone(cfg.checkpoint, cfg)
    whole = as_run(cfg, start)
    say_next(whole, train(whole, start))


def as_run(cfg: FinetuneConfig, loaded: LoadedBackbone) -> PretrainConfig:
    """The training run that `cfg` stands for: what `config.yaml` of its run directory holds."""
    size = cfg.views.global_size
    if size is None:
        size = one_or_two(pair(loaded.image_size))
    return PretrainConfig(
        method=cfg.method,
        backbone=cfg.backbone,
        data=cfg.data,
        views=SupervisedViewsConfig(**{**asdict(cfg.views), "global_size": size}),
        optim=cfg.optim,
        trainer=cfg.trainer,
        saving=cfg.saving,
        evaluate=cfg.evaluate,
        logger=cfg.logger,
        run=cfg.run,
        start=cfg.checkpoint,
        **{field.name: getattr(cfg, field.name) for field in fields(ReadingConfig)},
    )
