"""`vit-suite finetune`: supervised training that starts from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from vit_suite.config.data import DataConfig
from vit_suite.config.limits import Checkpoint, Sides
from vit_suite.config.shared import (
    BackboneConfig,
    EvaluateConfig,
    LoggerConfig,
    ReadingConfig,
    RunOptions,
    SavingConfig,
    TrainerConfig,
)
from vit_suite.config.supervised import SupervisedConfig, SupervisedOptimConfig, SupervisedViewsConfig


@dataclass
class FinetuneViewsConfig(SupervisedViewsConfig):
    """One view of an image: crop, flip, RandAugment or color jitter, erasing."""

    global_size: Sides | None = None  # type: ignore[assignment]
    """Side in pixels of a view, or [height, width]; the checkpoint's when not given. Position embeddings are resized
    once to another."""


@dataclass
class FinetuneConfig(ReadingConfig):
    """Fine-tune a backbone on labels. Augmentation is DeiT's; rate, length and drop path are those of MAE's code for
    ViT-B, and the layer decay its paper's (He et al. 2021, arXiv 2111.06377). Of `backbone` only drop_path is free: the
    checkpoint decides the rest."""

    checkpoint: Checkpoint
    """Run directory, file or folder of a released network (DINO, DINOv2, DINOv3, MAE, SiT, Hugging Face, timm,
    solo-learn, lightly), timm:NAME, or builtin:shapes."""
    method: SupervisedConfig = field(default_factory=lambda: SupervisedConfig(ema=0.0))
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: FinetuneViewsConfig = field(default_factory=FinetuneViewsConfig)
    optim: SupervisedOptimConfig = field(
        default_factory=lambda: SupervisedOptimConfig(lr=5e-4, min_lr=1e-6, layer_decay=0.75)
    )
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunOptions = field(default_factory=lambda: RunOptions(name="finetune", output="runs/finetune"))
