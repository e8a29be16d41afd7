"""Backbone against the official DINOv2 and DINOv3 networks: outputs, attention, intermediate layers, positions and
masked patches at every size of the fixture, through the suite's own conversion of names."""

from __future__ import annotations

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone
from vit_suite.weights.families import by_name

from .golden import largest_error, load_golden, record, with_prefix

DINOV2 = ["dinov2_vit", "dinov2_vit_reg", "dinov2_vit_swiglu"]
DINOV3 = ["dinov3_vit", "dinov3_vit_swiglu"]
FORWARD = {"dinov2": 3e-5, "dinov3": 5e-5}
POSITION, ROPE, ATTENTION = 2e-6, 2e-6, 1e-5
"""Tolerances of the fixtures' README, a few times the rounding noise that was measured there."""


def options(hyper: dict, state: dict[str, torch.Tensor]) -> dict:
    """Our options for a fixture's hyperparameters."""
    v3 = "rope_base" in hyper
    gated = "swiglu" in hyper["ffn_layer"]
    hidden = (state["blocks.0.mlp.w3.weight"].shape[1] if gated else state["blocks.0.mlp.fc1.weight"].shape[0]) / hyper[
        "dim"
    ]
    common = {"mlp_ratio": hidden, "mlp": "swiglu" if gated else "gelu", "layer_scale": 1e-5}
    if v3:
        assert hyper["rope_base"] == 100 and hyper["rope_normalize_coords"] == "separate"
        assert hyper["norm_layer"] == "layernormbf16"  # epsilon 1e-5
        return common | {"positions": "rope", "registers": hyper["n_storage_tokens"]}
    antialias = hyper["interpolate_antialias"]
    assert hyper["interpolate_offset"] == (0.0 if antialias else 0.1)
    registers = hyper["num_register_tokens"]
    resize = "antialias" if antialias else "offset"
    return common | {"registers": registers, "resize": resize, "prefix_positions": not registers}


@pytest.fixture(scope="module", params=DINOV2 + DINOV3)
def golden(request):
    hyper, tensors = load_golden(request.param)
    state = with_prefix(tensors, "state.")
    family = request.param.split("_")[0]
    row = by_name("dinov2_reg" if hyper.get("num_register_tokens") else family)
    named = {name: tensor for name, tensor in row.rename(state).items() if name != "mask_token"}
    named = {name: tensor for name, tensor in named.items() if not name.endswith(("periods", "bias_mask"))}
    cfg = BackboneConfig(
        patch_size=hyper["patch"], dim=hyper["dim"], depth=hyper["depth"], heads=hyper["heads"],
        image_size=[hyper["img"]] * 2, drop_path=0.0, **options(hyper, state),
    )  # fmt: skip
    backbone = Backbone(cfg).eval()
    backbone.vit.load_state_dict(named)
    return request.param, hyper, tensors, backbone


@torch.no_grad()
def test_outputs_at_every_size(golden):
    name, hyper, tensors, backbone = golden
    forward = FORWARD[name.split("_")[0]]
    extra = "storage" if name in DINOV3 else "reg"
    assert hyper["sizes"]
    for height, width in hyper["sizes"]:
        key = f"{height}x{width}"
        images, grid = tensors[f"x_{key}"], (height // hyper["patch"], width // hyper["patch"])
        tokens = backbone.tokens(images, blocks=range(-hyper["n"], 0))
        assert tokens.grid == grid
        record(name, "CLS", largest_error(tokens.cls, tensors[f"cls_{key}"]), forward)
        record(name, "CLS alone", largest_error(backbone(images), tensors[f"cls_{key}"]), forward)
        record(name, "patches", largest_error(tokens.patches, tensors[f"patch_{key}"]), forward)
        if f"{extra}_{key}" in tensors:
            record(name, "registers", largest_error(tokens.registers, tensors[f"{extra}_{key}"]), forward)
        for index, (cls, patches) in enumerate(tokens.blocks):
            feature_map = patches.transpose(1, 2).unflatten(2, grid)
            for what, ours in (("map", feature_map), ("cls", cls)):
                error = largest_error(ours, tensors[f"inter{index}_{what}_{key}"])
                record(name, "intermediate layers", error, forward)
        attention = backbone.last_attention(images, slice(0, 1))[:, :, 0]
        record(name, "attention of CLS", largest_error(attention, tensors[f"attn_cls_last_{key}"]), ATTENTION)


@torch.no_grad()
def test_positions_at_every_size(golden):
    name, hyper, tensors, backbone = golden
    for height, width in hyper["sizes"]:
        grid, key = (height // hyper["patch"], width // hyper["patch"]), f"{height}x{width}"
        if name in DINOV3:
            sines, cosines = backbone.rope(grid)[0].chunk(2, dim=-1)
            record(name, "rotary sines", largest_error(sines, tensors[f"rope_sin_{key}"]), ROPE)
            record(name, "rotary cosines", largest_error(cosines, tensors[f"rope_cos_{key}"]), ROPE)
        else:  # of the patches; with registers the CLS token holds its own
            prefix = 0 if backbone.vit.no_embed_class else 1
            ours = backbone.position(grid, prefix)[:, prefix:]
            record(name, "positions", largest_error(ours, tensors[f"pos_{key}"][:, 1:]), POSITION)


@torch.no_grad()
def test_masked_patches(golden):
    name, hyper, tensors, backbone = golden
    height, width = hyper["sizes"][0]
    images, token = tensors[f"x_{height}x{width}"], tensors["state.mask_token"][0]
    tokens = backbone.tokens(images, hidden=tensors["mask"], mask_token=token)
    forward = FORWARD[name.split("_")[0]]
    found = {key: value for key, value in tensors.items() if key.startswith("masked") and value.is_floating_point()}
    assert found
    for key, expected in found.items():
        ours = {"cls": tokens.cls, "patch": tokens.patches}.get(key.split("_")[1], tokens.registers)
        record(name, f"masked: {key}", largest_error(ours, expected), forward)
