"""What a protocol name stands for, and what wins over it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vit_suite.config import BackboneConfig, LinearConfig
from vit_suite.errors import UserError
from vit_suite.evaluation.linear_heads import Recipe
from vit_suite.evaluation.linear_inputs import Feature
from vit_suite.evaluation.linear_protocols import resolve
from vit_suite.models.backbone import Backbone


def tiny_backbone(**options) -> Backbone:
    return Backbone(BackboneConfig(patch_size=8, dim=24, depth=2, heads=3, image_size=[16, 16], **options))


def test_dino_takes_cls_of_four_blocks_or_for_wide_networks_one_with_the_mean():
    def features(dim, depth=12, has_cls=True):
        shape = SimpleNamespace(dim=dim, depth=depth, has_cls=has_cls, prefix_tokens=int(has_cls))
        return resolve(LinearConfig("c", protocol="dino"), shape)

    protocol, found = features(384)
    assert (
        found == [Feature("cls", 4)]
        and features(768)[1] == [Feature("cls_mean", 1)]
        and features(192, 2)[1] == [Feature("cls", 2)]
    )
    assert features(384, has_cls=False)[1] == [Feature("mean", 4)]
    assert (
        protocol.augment
        and protocol.recipe.lr == (1e-3,)
        and protocol.recipe.epochs == 100
        and protocol.recipe.optimizer == "sgd"
    )


def test_sit_wants_a_second_token_and_its_own_optimizer():
    protocol, found = resolve(LinearConfig("c", protocol="sit", head="mlp"), tiny_backbone(registers=1))
    assert found == [Feature("tokens", 1)] and protocol.recipe == Recipe(
        (5e-4,), 501, 256, "adamw", 5e-4, 5, 5e-6, hidden_dim=1024
    )
    with pytest.raises(
        UserError,
        match=r"protocol sit: .* the backbone of 'c' has 1 \(backbone.registers is 0\); use --protocol dino or",
    ):
        resolve(LinearConfig("c", protocol="sit"), tiny_backbone())
    with pytest.raises(
        UserError, match="protocol sit trains with AdamW, which takes one learning rate at a time, not 2"
    ):
        resolve(LinearConfig("c", protocol="sit", lr=[1e-3, 1e-2]), tiny_backbone(registers=1))


def test_what_is_given_wins_over_the_protocol():
    cfg = LinearConfig(
        "c", protocol="dino", lr=[0.1, 0.1, 0.2], blocks=[1], pool=["mean"], epochs=3, augment=False, batch_size=64
    )
    protocol, found = resolve(cfg, tiny_backbone())
    assert found == [Feature("mean", 1)] and not protocol.augment
    assert protocol.recipe == Recipe((0.1, 0.2), 3, 64)
    assert resolve(LinearConfig("c"), tiny_backbone(class_token=False, pool="mean"))[1] == [
        Feature("mean", 1),
        Feature("mean", 2),
    ]
    assert Feature("tokens", 1) in resolve(LinearConfig("c"), tiny_backbone(registers=1))[1]
