"""Which parameters decay."""

from __future__ import annotations

from vit_suite.config import BackboneConfig, OptimConfig, SiTOptimConfig, SupervisedOptimConfig
from vit_suite.models.backbone import Backbone
from vit_suite.optim.groups import parameter_groups


def decayed(decay_tokens: bool) -> set[str]:
    backbone = Backbone(BackboneConfig(patch_size=4, dim=24, depth=1, heads=3, registers=1, image_size=[16, 16]))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    groups = parameter_groups(backbone, decay_tokens=decay_tokens)
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[id(parameter)] for group in groups if group["decay"] for parameter in group["params"]}


def test_tokens_and_positions_decay_as_in_dino_or_not_as_in_deit():
    tokens = {"vit.cls_token", "vit.pos_embed", "vit.reg_token"}
    assert decayed(True) - decayed(False) == tokens
    assert all(name.endswith(".weight") for name in decayed(False))
    assert OptimConfig().decay_tokens and not SiTOptimConfig().decay_tokens and not SupervisedOptimConfig().decay_tokens
