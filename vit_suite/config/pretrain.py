"""`vit-suite pretrain`: a run, whatever its method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_suite.config.attention import SnapshotConfig
from vit_suite.config.data import DataConfig
from vit_suite.config.dino import DINOConfig
from vit_suite.config.limits import Checkpoint
from vit_suite.config.method import MethodConfig
from vit_suite.config.shared import (
    BackboneConfig,
    EvaluateConfig,
    LoggerConfig,
    OptimConfig,
    ReadingConfig,
    RunOptions,
    SavingConfig,
    TrainerConfig,
)
from vit_suite.config.views import CropConfig, ViewsConfig
from vit_suite.registry import Column

VERSION = 2
"""Layout of the options; a run writes it into its config.yaml. Raise it when an option is renamed, moved or removed."""
METHODS = Column("config")
"""Method name -> the class of its options. `method.name` picks the class, so that each method keeps its own
defaults."""
VIEWS = Column("views")
"""Method name -> the class of the options of its views."""
OPTIMS = Column("optim")
"""Method name -> the class of the options of its optimizer."""


def by_method(variants: Mapping[str, type]) -> dict[str, Any]:
    """Metadata of a field whose class follows method.name."""
    return {"variants": variants, "selector": "method.name"}


@dataclass
class PretrainConfig(ReadingConfig):
    """A training run."""

    method: MethodConfig = field(default_factory=DINOConfig, metadata={"variants": METHODS})
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    views: CropConfig = field(default_factory=ViewsConfig, metadata=by_method(VIEWS))
    optim: OptimConfig = field(default_factory=OptimConfig, metadata=by_method(OPTIMS))
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    snapshots: SnapshotConfig = field(default_factory=SnapshotConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    run: RunOptions = field(default_factory=RunOptions)
    start: Checkpoint | None = None
    """Checkpoint whose backbone training starts from: whatever --checkpoint of other commands takes. Its architecture
    and normalization become the run's. `finetune` sets it to its --checkpoint."""
    start_heads: bool = False
    """Give student and teacher the teacher's heads of `start` too. It then has to be a full training checkpoint: a run
    directory, a .ckpt, or a checkpoint of main_dino.py."""
    drill: str | None = None
    """Interrupt the training on purpose and go on, to see that nothing is lost: preempt@STEP (SIGUSR1) or kill@STEP
    (SIGKILL), several with commas."""

    def __post_init__(self) -> None:
        for value, variants in ((self.views, VIEWS), (self.optim, OPTIMS)):
            if type(value) is not variants[self.method.name]:
                raise TypeError(
                    f"method {self.method.name} takes {variants[self.method.name].__name__}, not {type(value).__name__}"
                )
