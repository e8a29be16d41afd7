"""The dataclasses of a run: every option of every method, once, with its unit, default and source.

They stand here, apart from the code that uses them, so that `vit-suite pretrain --help` and a wrong key answer without
importing torch (0.2 s instead of 5 s). Nothing below has a second default elsewhere: modules take these objects.
"""

from vit_suite.config.attention import AttentionConfig, SnapshotConfig
from vit_suite.config.data import DataConfig, ImagesConfig, LocalizeDataConfig, ScoreDataConfig
from vit_suite.config.demo import DemoConfig
from vit_suite.config.dino import DINOConfig
from vit_suite.config.doctor import DoctorConfig
from vit_suite.config.embed import EmbedConfig, NeighboursConfig
from vit_suite.config.evaluate import KNNConfig, LinearConfig, ScoreConfig
from vit_suite.config.export import ExportConfig
from vit_suite.config.finetune import FinetuneConfig, FinetuneViewsConfig
from vit_suite.config.launch import LaunchConfig
from vit_suite.config.limits import Range
from vit_suite.config.localize import LocalizeConfig
from vit_suite.config.make_shards import MakeShardsConfig
from vit_suite.config.method import MethodConfig
from vit_suite.config.predict import PredictConfig
from vit_suite.config.pretrain import METHODS, OPTIMS, VERSION, VIEWS, PretrainConfig
from vit_suite.config.profile import ProfileConfig
from vit_suite.config.recipes import RecipesConfig
from vit_suite.config.report import ReportConfig
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
from vit_suite.config.sit import SiTConfig, SiTOptimConfig, SiTViewsConfig
from vit_suite.config.supervised import SupervisedConfig, SupervisedOptimConfig, SupervisedViewsConfig
from vit_suite.config.views import CropConfig, ViewsConfig

__all__ = [
    "METHODS",
    "OPTIMS",
    "VERSION",
    "VIEWS",
    "AttentionConfig",
    "BackboneConfig",
    "CropConfig",
    "DINOConfig",
    "DataConfig",
    "DemoConfig",
    "DoctorConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FinetuneViewsConfig",
    "ImagesConfig",
    "KNNConfig",
    "LaunchConfig",
    "LinearConfig",
    "LocalizeConfig",
    "LocalizeDataConfig",
    "LoggerConfig",
    "MakeShardsConfig",
    "MethodConfig",
    "NeighboursConfig",
    "OptimConfig",
    "PredictConfig",
    "PretrainConfig",
    "ProfileConfig",
    "Range",
    "ReadingConfig",
    "RecipesConfig",
    "ReportConfig",
    "RunOptions",
    "SavingConfig",
    "ScoreConfig",
    "ScoreDataConfig",
    "SiTConfig",
    "SiTOptimConfig",
    "SiTViewsConfig",
    "SnapshotConfig",
    "SupervisedConfig",
    "SupervisedOptimConfig",
    "SupervisedViewsConfig",
    "TrainerConfig",
    "ViewsConfig",
]
