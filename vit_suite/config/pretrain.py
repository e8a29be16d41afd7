"""`vit-suite pretrain`: a run, whatever its method."""

from __future__ import annotations

from dataclasses import dataclass, field

from vit_suite.config.attention import SnapshotConfig
from vit_suite.config.data import DataConfig
from vit_suite.config.dino import DINOConfig
from vit_suite.config.shared import (
    BackboneConfig,
    CheckpointConfig,
    EvaluateConfig,
    LoggerConfig,
    OptimConfig,
    RunOptions,
    TrainerConfig,
)
from vit_suite.config.sit import SiTConfig, SiTOptimConfig, SiTViewsConfig
from vit_suite.config.supervised import SupervisedConfig, SupervisedOptimConfig, SupervisedViewsConfig
from vit_suite.config.views import CropConfig, ViewsConfig

METHODS = {"dino": DINOConfig, "sit": SiTConfig, "supervised": SupervisedConfig}
"""Method name -> its options. `method.name` picks the class, so that each method keeps its own defaults."""
VIEWS = {"dino": ViewsConfig, "sit": SiTViewsConfig, "supervised": SupervisedViewsConfig}
"""Method name -> the views it trains on."""
OPTIMS = {"dino": OptimConfig, "sit": SiTOptimConfig, "supervised": SupervisedOptimConfig}
"""Method name -> its optimizer."""


def by_method(variants: dict[str, type]) -> dict:
    """Metadata of a field whose class follows method.name."""
    return {"variants": variants, "selector": "method.name"}


@dataclass
class PretrainConfig:
    """A training run."""

    method: DINOConfig | SiTConfig | SupervisedConfig = field(
        default_factory=DINOConfig, metadata={"variants": METHODS}
    )
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: CropConfig = field(default_factory=ViewsConfig, metadata=by_method(VIEWS))
    optim: OptimConfig = field(default_factory=OptimConfig, metadata=by_method(OPTIMS))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunOptions = field(default_factory=RunOptions)
    drill: str | None = None
    """Interrupt the training on purpose and go on, to see that nothing is lost: preempt@STEP (SIGUSR1) or kill@STEP
    (SIGKILL), several with commas."""

    def __post_init__(self) -> None:
        for value, variants in ((self.views, VIEWS), (self.optim, OPTIMS)):
            if type(value) is not variants[self.method.name]:
                raise TypeError(
                    f"method {self.method.name} takes {variants[self.method.name].__name__}, not {type(value).__name__}"
                )
