"""The training methods by name: one row each.

A row holds import names instead of classes, so that `vit-suite --help` and a wrong option answer without importing
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple


class MethodRow(NamedTuple):
    """Where a method and its options are defined. Each field is `module:Name`."""

    module: str
    """The LightningModule, a subclass of `methods.base.Method`."""
    config: str
    """Dataclass of the options `method.*`."""
    views: str = "vit_suite.config.views:ViewsConfig"
    """Dataclass of the options `views.*`, with the method's defaults."""
    optim: str = "vit_suite.config.shared:OptimConfig"
    """Dataclass of the options `optim.*`, with the method's defaults."""


METHODS: dict[str, MethodRow] = {
    "dino": MethodRow("vit_suite.methods.dino:DINO", "vit_suite.config.dino:DINOConfig"),
    "dinov2": MethodRow(
        "vit_suite.methods.dinov2:DINOv2",
        "vit_suite.config.dinov2:DINOv2Config",
        views="vit_suite.config.dinov2:DINOv2ViewsConfig",
        optim="vit_suite.config.dinov2:DINOv2OptimConfig",
    ),
    "mae": MethodRow(
        "vit_suite.methods.mae:MAE",
        "vit_suite.config.mae:MAEConfig",
        views="vit_suite.config.mae:MAEViewsConfig",
        optim="vit_suite.config.mae:MAEOptimConfig",
    ),
    "sit": MethodRow(
        "vit_suite.methods.sit:SiT",
        "vit_suite.config.sit:SiTConfig",
        views="vit_suite.config.sit:SiTViewsConfig",
        optim="vit_suite.config.sit:SiTOptimConfig",
    ),
    "supervised": MethodRow(
        "vit_suite.methods.supervised:SupervisedViT",
        "vit_suite.config.supervised:SupervisedConfig",
        views="vit_suite.config.supervised:SupervisedViewsConfig",
        optim="vit_suite.config.supervised:SupervisedOptimConfig",
    ),
}
"""Value of `method.name` -> its row. A new method is one file in methods/, one dataclass in config/, and one row here
(docs/add_a_method.md)."""


def load(place: str) -> Any:
    """`"package.module:Name"` -> that object; imports the module."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class Column(Mapping[str, Any]):
    """One field of all rows as a mapping: method name -> the class. A class is imported when it is asked for, and a row
    that is added later is seen."""

    def __init__(self, field: str):
        self.field = field

    def __getitem__(self, name: str) -> Any:
        return load(getattr(METHODS[name], self.field))

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)
