"""Our networks built from a fixture's hyperparameters and loaded with its weights."""

from __future__ import annotations

import torch

from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone


def golden_backbone_config(hyper: dict) -> BackboneConfig:
    """The fixture's ViT: no drop path, native grid of its `img`."""
    img = hyper["img"]
    return BackboneConfig(
        name="vit",
        patch_size=hyper["patch"],
        dim=hyper["dim"],
        depth=hyper["depth"],
        heads=hyper["heads"],
        mlp_ratio=hyper["mlp_ratio"],
        image_size=[img, img],
        drop_path=0.0,
    )


def golden_backbone(hyper: dict, state: dict[str, torch.Tensor]) -> Backbone:
    backbone = Backbone(golden_backbone_config(hyper)).eval()
    backbone.vit.load_state_dict(state)  # strict: the official key names are ours
    return backbone
