"""vit-suite: train vision transformers five ways, measure what they learned, show where they look.

The names below load on first use, so that `import vit_suite` and `vit-suite --help` do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "DINO": "vit_suite.methods.dino",
    "DINOv2": "vit_suite.methods.dinov2",
    "MAE": "vit_suite.methods.mae",
    "SiT": "vit_suite.methods.sit",
    "SupervisedViT": "vit_suite.methods.supervised",
    "Backbone": "vit_suite.models.backbone",
    "ImageDataModule": "vit_suite.data.module",
    "load_backbone": "vit_suite.weights.checkpoint",
    "knn_classify": "vit_suite.evaluation.knn",
    "linear_probe": "vit_suite.evaluation.linear",
    "attention_maps": "vit_suite.attention.maps",
    "load_config": "vit_suite.parsing",
    "train": "vit_suite.training.run",
}
__all__ = [
    "Backbone",
    "DINO",
    "DINOv2",
    "ImageDataModule",
    "MAE",
    "SiT",
    "SupervisedViT",
    "attention_maps",
    "knn_classify",
    "linear_probe",
    "load_backbone",
    "load_config",
    "train",
]

if TYPE_CHECKING:
    from vit_suite.attention.maps import attention_maps
    from vit_suite.data.module import ImageDataModule
    from vit_suite.evaluation.knn import knn_classify
    from vit_suite.evaluation.linear import linear_probe
    from vit_suite.methods.dino import DINO
    from vit_suite.methods.dinov2 import DINOv2
    from vit_suite.methods.mae import MAE
    from vit_suite.methods.sit import SiT
    from vit_suite.methods.supervised import SupervisedViT
    from vit_suite.models.backbone import Backbone
    from vit_suite.parsing import load_config
    from vit_suite.training.run import train
    from vit_suite.weights.checkpoint import load_backbone


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vit_suite' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
