"""Backbone against DINO's vision_transformer.py: outputs, attention, intermediate layers and positions at every size of
the fixture."""

from __future__ import annotations

import pytest
import torch

from vit_suite.models import blocks
from vit_suite.models.positions import resize_position

from .golden import largest_error, load_golden, record, with_prefix
from .networks import golden_backbone

FORWARD = 1e-5


@pytest.fixture(scope="module")
def golden():
    hyper, tensors = load_golden("dino_vit")
    return hyper, tensors, golden_backbone(hyper, with_prefix(tensors, "state."))


@torch.no_grad()
def test_backbone(golden):
    hyper, tensors, backbone = golden
    assert hyper["sizes"]
    for height, width in hyper["sizes"]:
        key = f"{height}x{width}"
        images = tensors[f"x_{key}"]
        grid = (height // hyper["patch"], width // hyper["patch"])
        position = resize_position(backbone.vit.pos_embed, backbone.native_grid, grid, 1)
        record("dino_vit", "position embedding", largest_error(position, tensors[f"pos_{key}"]), FORWARD)
        record("dino_vit", "CLS", largest_error(backbone(images), tensors[f"cls_{key}"]), FORWARD)
        record(
            "dino_vit",
            "last attention",
            largest_error(backbone.last_attention(images), tensors[f"attn_last_{key}"]),
            FORWARD,
        )
        kept = range(-hyper["n"], 0)
        tokens = backbone.tokens(images, blocks=kept)
        assert tokens.grid == grid
        for index, (cls, patches) in enumerate(tokens.blocks):
            ours = torch.cat([cls[:, None], patches], dim=1)
            record("dino_vit", "intermediate layers", largest_error(ours, tensors[f"inter{index}_{key}"]), FORWARD)
        record("dino_vit", "tokens().cls", largest_error(tokens.cls, tensors[f"cls_{key}"]), FORWARD)


@torch.no_grad()
def test_fused_attention_reads_the_same(golden, monkeypatch):
    """The attention that is returned does not depend on the kernel that the block runs."""
    hyper, tensors, backbone = golden
    height, width = hyper["sizes"][0]
    monkeypatch.setattr(blocks, "PLAIN", {})
    images = tensors[f"x_{height}x{width}"]
    record("dino_vit", "CLS, fused kernel", largest_error(backbone(images), tensors[f"cls_{height}x{width}"]), FORWARD)
    error = largest_error(backbone.last_attention(images), tensors[f"attn_last_{height}x{width}"])
    record("dino_vit", "last attention, fused kernel", error, FORWARD)
