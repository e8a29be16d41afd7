"""Networks beyond the plain ViT: rotary positions, LayerScale, gated MLPs, convolutional stems, patches that are no
squares, and positions at other sizes. Their numbers: tests/parity/test_families.py."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.eva import Eva
from torch.nn import functional

from vit_suite import DINO, SiT, SupervisedViT, attention_maps
from vit_suite.config import (
    BackboneConfig,
    DINOConfig,
    SiTConfig,
    SiTViewsConfig,
    SupervisedConfig,
    SupervisedViewsConfig,
    ViewsConfig,
)
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.positions import resize_position, sincos_positions
from vit_suite.views.draw import alone

NETWORKS = {
    "dinov2": {"layer_scale": 1e-5, "registers": 2, "prefix_positions": False, "resize": "antialias"},
    "swiglu": {"mlp": "swiglu", "mlp_ratio": 8 / 3, "layer_scale": 0.1},
    "dinov3": {"positions": "rope", "registers": 2, "layer_scale": 0.1},
    "dinov3 swiglu": {"positions": "rope", "mlp": "swiglu", "layer_scale": 0.1},
    "convolutions": {"stem": "conv"},
    "wide patches": {"patch_size": [2, 8]},
    "five channels": {"channels": 5, "positions": "rope"},
    "timm dinov3": {"name": "vit_small_patch16_dinov3", "dim": 24, "heads": 3, "patch_size": 4},
}


def config(**changes) -> BackboneConfig:
    options = {"patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "image_size": [16, 16], "drop_path": 0.0}
    return BackboneConfig(**options | changes)


def tiny(**changes) -> Backbone:
    torch.manual_seed(0)
    return Backbone(config(**changes)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_what_the_last_block_multiplies(name):
    """softmax(q k^T) v and the output projection, from the attention that is returned, are the block's own answer."""
    backbone = tiny(**NETWORKS[name])
    images = torch.randn(2, backbone.cfg.channels, 16, 24)
    x, grid = backbone.embed(images)
    *_, before, _ = [x, *backbone.blocks(x, grid)]
    block, rope = backbone.vit.blocks[-1], backbone.rope(grid)[-1]
    attention = backbone.last_attention(images)
    tokens = backbone.prefix_tokens + grid[0] * grid[1]
    assert grid == backbone.grid_of(images) and attention.shape == (2, 3, tokens, tokens)
    normed = block.norm1(before)
    values = functional.linear(
        normed, block.attn.qkv.weight[-24:], None if rope is not None else block.attn.qkv.bias[-24:]
    )
    if getattr(block.attn, "v_bias", None) is not None:
        values = values + block.attn.v_bias
    mixed = attention @ values.unflatten(-1, (3, -1)).transpose(1, 2)
    expected = block.attn(normed) if rope is None else block.attn(normed, rope=rope)
    torch.testing.assert_close(block.attn.proj(mixed.transpose(1, 2).flatten(2)), expected, atol=1e-5, rtol=1e-4)
    maps = attention_maps(backbone, images)
    assert maps.shape == (2, 3, *grid) and maps.sum((-1, -2)).max() < 1


@pytest.mark.parametrize("name", NETWORKS)
def test_every_method_trains_every_network(name, monkeypatch):
    """A step of DINO, SiT and supervised training reaches every parameter, drop path included."""
    backbone = config(**NETWORKS[name] | {"drop_path": 0.1, "image_size": None})
    images = [torch.randn(4, backbone.channels, side, side) for side in (16, 16, 8)]
    statistics = {"mean": [0.5] * backbone.channels, "std": [0.5] * backbone.channels, "batch_size": 4}
    small = {"out_dim": 16, "hidden_dim": 16, "bottleneck_dim": 8, "norm_last_layer": False}
    methods = [
        DINO(DINOConfig(**small), backbone, ViewsConfig(global_size=16, local_size=8, local_crops=1), **statistics),
        SupervisedViT(
            SupervisedConfig(), backbone, SupervisedViewsConfig(global_size=16, randaugment=0), classes=5, **statistics
        ),
    ]
    if backbone.patch_size == 4:
        sit = SiTConfig(rotation="name" not in NETWORKS[name], contrastive_dim=8)
        methods.append(SiT(sit, backbone, SiTViewsConfig(global_size=16), **statistics))
    for method in methods:
        monkeypatch.setattr(type(method), "current_epoch", 0, raising=False)
        crops = {DINO: images, SiT: images[:2], SupervisedViT: images[:1]}[type(method)]
        loss = method.train().losses(crops, torch.arange(4), alone(4))["loss"]
        loss.backward()
        assert torch.isfinite(loss)
        for part, parameter in method.trained().named_parameters():
            assert not parameter.requires_grad or parameter.grad is not None, f"{type(method).__name__}: {part}"


@torch.no_grad()
def test_rotary_positions_are_relative_and_fit_any_size():
    backbone = tiny(positions="rope")
    assert isinstance(backbone.vit, Eva) and backbone.vit.pos_embed is None
    images = torch.randn(1, 3, 24, 16)
    moved = backbone.tokens(images.flip(-1)).patches.unflatten(1, (6, 4)).flip(2).flatten(1, 2)
    still = backbone.tokens(images).patches
    assert (moved - still).abs().max() > 1e-3  # where a patch lies matters
    plain = tiny()
    swapped = images.clone()
    swapped[..., :4], swapped[..., 4:8] = images[..., 4:8], images[..., :4]
    assert (backbone(images) - backbone(swapped)).abs().max() > 1e-5
    assert plain(images).shape == backbone(images).shape


@torch.no_grad()
def test_hidden_width_is_the_one_asked_for():
    for dim, hidden in ((40, 112), (48, 128), (24, 64), (24, 70), (36, 97)):
        for positions in ("learned", "rope"):
            heads = 3 if dim != 40 else 5
            for mlp, rows in (("gelu", hidden), ("swiglu", hidden if positions == "rope" else 2 * hidden)):
                backbone = tiny(dim=dim, heads=heads, mlp=mlp, mlp_ratio=hidden / dim, positions=positions)
                first = next(p for name, p in backbone.vit.blocks[0].mlp.named_parameters() if "fc1" in name)
                assert first.shape == (rows, dim), (dim, hidden, positions, mlp)
    assert tiny(mlp_ratio=2.67).vit.blocks[0].mlp.fc1.out_features == math.floor(24 * 2.67)


@torch.no_grad()
def test_layer_scale_starts_where_it_is_set():
    for options, names in (({}, ("ls1.gamma", "ls2.gamma")), ({"positions": "rope"}, ("gamma_1", "gamma_2"))):
        block = dict(tiny(layer_scale=0.25, **options).vit.blocks[0].named_parameters())
        assert all(torch.equal(block[name], torch.full((24,), 0.25)) for name in names)
        assert not any("gamma" in name for name, _ in tiny(**options).vit.named_parameters())


@torch.no_grad()
def test_positions_of_other_sizes_by_each_rule():
    learned = {how: tiny(resize=how).position((6, 5), 1) for how in ("offset", "antialias", "bicubic")}
    assert not torch.allclose(learned["antialias"], learned["bicubic"], atol=1e-4)
    assert not torch.allclose(learned["offset"], learned["bicubic"], atol=1e-4)
    own = tiny().vit.pos_embed
    for how, found in learned.items():
        torch.testing.assert_close(found, resize_position(own, (4, 4), (6, 5), 1, how), rtol=0, atol=0)
        assert torch.equal(found[:, :1], own[:, :1])  # CLS keeps its own
    fixed = tiny(positions="sincos_2d", resize="sincos")
    torch.testing.assert_close(fixed.position((6, 5), 1), sincos_positions("sincos_2d", (6, 5), 24, 1))
    assert tiny().cfg.resize == "offset" and tiny(resize="bicubic").cfg.resize == "bicubic"
    registers = Backbone(
        BackboneConfig(name="vit_small_patch14_reg4_dinov2", depth=1, image_size=[28, 28], drop_path=0)
    )
    assert registers.cfg.resize == "antialias" and registers.patch == (14, 14)


@torch.no_grad()
def test_positions_of_patches_alone():
    backbone = tiny(prefix_positions=False, registers=2)
    assert backbone.vit.pos_embed.shape == (1, 16, 24)
    x, _ = backbone.embed(torch.randn(1, 3, 16, 16))
    torch.testing.assert_close(x[0, 0], backbone.vit.cls_token[0, 0])
    torch.testing.assert_close(x[0, 1:3], backbone.vit.reg_token[0])


@torch.no_grad()
def test_patches_that_are_no_squares():
    """Spectrograms, lidar, and series held as one-row images of N channels."""
    series = tiny(patch_size=[1, 16], channels=6, image_size=[1, 256])
    tokens = series.tokens(torch.randn(2, 6, 1, 128))
    assert series.native_grid == (1, 16) and tokens.grid == (1, 8) and tokens.patches.shape == (2, 8, 24)
    assert series.cfg.patch_size == [1, 16] and Backbone(series.cfg).patch == (1, 16)
    assert tiny(patch_size=[4, 4]).cfg.patch_size == 4
    with pytest.raises(UserError, match="needs square patches, and those of the backbone are 1x16"):
        _ = series.patch_size
    with pytest.raises(UserError, match=r"image size 1x100 is not divisible by the patch size 1x16: .* 96 and 112"):
        series(torch.randn(1, 6, 1, 100))


def test_dino_learns_from_ready_made_views_of_one_row(monkeypatch):
    monkeypatch.setattr(DINO, "current_epoch", 0, raising=False)
    backbone = config(patch_size=[1, 16], channels=6, image_size=[1, 256])
    small = DINOConfig(out_dim=16, hidden_dim=16, bottleneck_dim=8)
    statistics = {"mean": [0.5] * 6, "std": [0.5] * 6, "batch_size": 4}
    method = DINO(small, backbone, ViewsConfig(global_size=256, local_size=64, local_crops=1), **statistics)
    series = [torch.randn(4, 6, 1, steps) for steps in (256, 256, 64)]
    method.losses(series, draw=alone(4))["loss"].backward()
    assert all(p.grad is not None for p in method.student.backbone.parameters())


def test_a_convolutional_stem_is_the_papers():
    """Xiao et al. 2021, appendix A: 48, 96, 192 and 384 channels before the 1x1 of ViT-S, and a block fewer."""
    backbone = Backbone(BackboneConfig(stem="conv", drop_path=0.0))
    convolutions = [part for part in backbone.vit.patch_embed.modules() if isinstance(part, torch.nn.Conv2d)]
    assert [part.out_channels for part in convolutions] == [48, 96, 192, 384, 384]
    assert [part.stride for part in convolutions] == [(2, 2)] * 4 + [(1, 1)] and backbone.depth == 11
    assert backbone(torch.randn(2, 3, 32, 48)).shape == (2, 384)
    stem = tiny(stem="conv").train()
    stem(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in stem.vit.patch_embed.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "conv", "patch_size": 6, "image_size": [12, 12]}, r"has to be 4, 8, 16 or 32, not 6"),
        ({"stem": "conv", "patch_size": [4, 8]}, r"has to be 4, 8, 16 or 32, not \[4, 8\]"),
        ({"stem": "conv", "dim": 27, "heads": 3}, r"needs a backbone\.dim that 2 divides"),
        ({"positions": "rope", "stem": "conv"}, r"backbone\.stem conv is not for backbone\.positions rope"),
        ({"positions": "rope", "norm": "post"}, r"backbone\.norm post is not for backbone\.positions rope"),
        ({"positions": "rope", "dim": 18}, r"dim / backbone\.heads has to be divisible by 4, and is 6"),
        ({"resize": "sincos"}, r"resize sincos is for backbone\.positions sincos_1d and sincos_2d, not learned"),
        ({"name": "vit_tiny_patch16_224", "stem": "conv"}, r"backbone\.stem is for backbone\.name 'vit'"),
        ({"name": "vit_tiny_patch16_224", "resize": "sincos"}, r"resize sincos is for backbone\.name 'vit'"),
    ],
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        Backbone(config(**options))
