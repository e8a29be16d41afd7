"""What timm has no option for: fixed positions, post-norm, causal order, mean pooling, hidden patches, drop path over
ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.layers import DropPath as TimmDropPath

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone
from vit_suite.models.blocks import DropPath
from vit_suite.models.positions import sincos_positions
from vit_suite.views.draw import Draw, alone


def tiny(**changes) -> Backbone:
    torch.manual_seed(0)
    options = {"patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "image_size": [16, 16], "drop_path": 0.0}
    return Backbone(BackboneConfig(**options | changes)).eval()


def test_sine_positions_of_the_sequence():
    table = sincos_positions("sincos_1d", (2, 3), 8, prefix=1)[0]
    assert table.shape == (7, 8)
    for place in (0, 1, 6):
        for pair in range(4):
            angle = place / 10000 ** (2 * pair / 8)
            assert table[place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sine_positions_of_rows_and_columns():
    table = sincos_positions("sincos_2d", (2, 3), 8, prefix=1)[0]
    assert not table[0].any()
    row, column = 1, 2
    expected = [
        wave(place / 10000 ** (pair / 2))
        for place in (column, row)
        for wave in (math.sin, math.cos)
        for pair in range(2)
    ]
    torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(expected), atol=1e-6, rtol=0)


def test_beyers_positions_are_those_of_big_vision():
    """Frequency i of D/4 is 10,000^(-i / (D/4 - 1)), so the slowest wave turns once in 2 pi 10,000 patches."""
    rows, columns = np.mgrid[:14, :14]
    rates = 10_000.0 ** -(np.arange(96) / 95)
    waves = [wave(np.outer(places, rates)) for places in (columns, rows) for wave in (np.sin, np.cos)]
    ours = sincos_positions("sincos_2d_beyer", (14, 14), 384, 0)[0]
    torch.testing.assert_close(ours, torch.from_numpy(np.concatenate(waves, 1)).float(), atol=1e-6, rtol=0)
    assert 0.04 < (ours - sincos_positions("sincos_2d", (14, 14), 384, 0)[0]).abs().max() < 0.05
    backbone = tiny(positions="sincos_2d_beyer", resize="sincos")
    torch.testing.assert_close(backbone.position((6, 5), 1), sincos_positions("sincos_2d_beyer", (6, 5), 24, 1))


def test_first_weights_of_flax():
    """Xavier-uniform for q, k and v apart; LeCun-normal patches; biases of the MLP close to 0."""
    vit = tiny(dim=96, heads=3, init="xavier").vit
    block = vit.blocks[0]
    for weight in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight, block.mlp.fc1.weight):
        most = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() < most and weight.std().item() == pytest.approx(most / math.sqrt(3), rel=0.05)
    patch = vit.patch_embed.proj.weight
    assert patch.std().item() == pytest.approx(1 / math.sqrt(patch[0].numel()), rel=0.05)
    assert not block.attn.qkv.bias.any() and 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    assert tiny(dim=96, heads=3).vit.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_gelu_by_tanh():
    x = torch.linspace(-3, 3, 50)
    exact, by_tanh = (tiny(mlp=kind).vit.blocks[0].mlp.act(x) for kind in ("gelu", "gelu_tanh"))
    torch.testing.assert_close(by_tanh, torch.nn.functional.gelu(x, approximate="tanh"))
    assert 1e-4 < (exact - by_tanh).abs().max() < 1e-3


@pytest.mark.parametrize("option", [{"init": "xavier"}, {"mlp": "gelu_tanh"}])
def test_options_that_rotary_networks_do_not_have(option):
    with pytest.raises(UserError, match=f"backbone.{next(iter(option))} .* is not for backbone.positions rope"):
        tiny(positions="rope", **option)


def test_fixed_positions_are_stored_but_not_trained():
    backbone = tiny(positions="sincos_2d")
    assert "pos_embed" in backbone.vit.state_dict()
    assert all(name != "pos_embed" for name, _ in backbone.vit.named_parameters())
    fixed = sincos_positions("sincos_2d", (4, 4), 24, 1)
    torch.testing.assert_close(backbone.vit.pos_embed, fixed)
    backbone(torch.randn(1, 3, 24, 16))  # other sizes are interpolated like learned positions


def test_a_width_that_the_waves_do_not_divide_is_named():
    with pytest.raises(UserError, match=r"sincos_2d needs a backbone\.dim that 4 divides, not 6"):
        tiny(positions="sincos_2d", dim=6, heads=1)


@torch.no_grad()
def test_post_norm_is_norm_after_the_sum():
    backbone = tiny(norm="post")
    block, x = backbone.vit.blocks[1], torch.randn(2, 17, 24)
    middle = block.norm1(x + block.attn(x))
    torch.testing.assert_close(block(x), block.norm2(middle + block.mlp(middle)))
    assert isinstance(backbone.vit.norm, torch.nn.Identity)
    tokens = backbone.tokens(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(tokens.cls.mean(-1), torch.zeros(2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_of_a_post_norm_block_is_what_it_runs():
    backbone = tiny(norm="post", depth=1)
    images = torch.randn(2, 3, 16, 16)
    x, _ = backbone.embed(images)
    block = backbone.vit.blocks[0]
    values = block.attn.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)[2]
    mixed = (backbone.last_attention(images) @ values).transpose(1, 2).reshape(2, 17, 24)
    torch.testing.assert_close(block.attn.proj(mixed), block.attn(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_causal_patches_do_not_see_later_ones():
    backbone = tiny(causal=True, registers=1)
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[..., 8:12, 4:8] += 1  # patch 9
    before, after = backbone.tokens(images), backbone.tokens(changed)
    moved = (before.patches - after.patches).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 9 + [True] * 7
    assert (before.cls - after.cls).abs().max() > 1e-6  # CLS and registers see everything
    assert (before.registers - after.registers).abs().max() > 1e-6
    attention = backbone.last_attention(images)[0, 0]
    assert torch.equal(attention[2:, 2:].triu(1), torch.zeros(16, 16)) and not attention[2:, :2].any()
    torch.testing.assert_close(attention.sum(-1), torch.ones(18))


@torch.no_grad()
def test_mean_pooling_with_and_without_a_cls_token():
    images = torch.randn(2, 3, 16, 16)
    for options in ({}, {"class_token": False}, {"class_token": False, "registers": 2}):
        backbone = tiny(pool="mean", **options)
        tokens = backbone.tokens(images, blocks=[0])
        torch.testing.assert_close(backbone(images), tokens.patches.mean(1))
        assert (tokens.cls is None) == (not options.get("class_token", True))
        assert tokens.registers.shape == (2, options.get("registers", 0), 24) and tokens.patches.shape == (2, 16, 24)
        assert (tokens.blocks[0][0] is None) == (tokens.cls is None)


def test_no_cls_token_to_pool_is_said():
    with pytest.raises(UserError, match=r"no CLS token: set backbone\.pool to mean"):
        tiny(class_token=False)
    with pytest.raises(UserError, match=r"no CLS token: set backbone\.pool to mean"):
        Backbone(BackboneConfig(name="vit_base_patch16_siglip_224"))
    with pytest.raises(UserError, match=r"backbone\.norm is for backbone\.name 'vit'"):
        Backbone(BackboneConfig(name="vit_tiny_patch16_224", norm="post"))


@torch.no_grad()
def test_hidden_patches_are_the_mask_token():
    backbone = tiny()
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5] = True
    images, token = torch.randn(1, 3, 16, 16), torch.randn(24)
    x, _ = backbone.embed(images, hidden, token)
    plain, _ = backbone.embed(images)
    torch.testing.assert_close(x[0, 6], token + backbone.vit.pos_embed[0, 6])
    assert torch.equal(x[0, [0, *range(1, 6), *range(7, 17)]], plain[0, [0, *range(1, 6), *range(7, 17)]])


@torch.no_grad()
def test_rows_of_the_attention():
    backbone = tiny()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(backbone.last_attention(images, slice(0, 1)), backbone.last_attention(images)[:, :, :1])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_drop_path_of_the_parts_of_a_batch_is_that_of_the_whole(parts):
    """Two views of eight images, whose paths every rank and micro-batch draws for itself."""
    backbone, images, count = tiny(drop_path=0.4).train(), torch.randn(2, 8, 3, 16, 16), 8 // parts

    def found(start: int, count: int) -> torch.Tensor:
        kept = backbone.drawn_paths(Draw(0, 0, 0, slice(start, start + count), 8), 2)
        return backbone(images[:, start : start + count].flatten(0, 1), kept.flatten(1)).unflatten(0, (2, count))

    whole = found(0, 8)
    torch.testing.assert_close(torch.cat([found(start, count) for start in range(0, 8, count)], dim=1), whole)
    assert (whole - backbone.eval()(images.flatten(0, 1)).unflatten(0, (2, 8))).abs().amax(-1).gt(1e-3).sum() > 8


def test_drawn_paths_are_kept_at_their_rates():
    backbone = tiny(drop_path=0.4).train()
    draws = [backbone.drawn_paths(Draw(0, 0, step, slice(0, 500), 500), 2) for step in range(4)]
    kept = torch.cat([drawn.flatten(1) for drawn in draws], dim=1)  # (2 x 3 blocks, 4000)
    assert set(kept[2:4].unique().tolist()) == {0.0, 1.25} and set(kept[:2].unique().tolist()) == {1.0}
    shares = kept.gt(0).float().mean(1)
    expected = torch.tensor([1, 1, 0.8, 0.8, 0.6, 0.6])
    bound = 4.5 * (expected * (1 - expected) / kept.shape[1]).sqrt()  # sigmas of a binomial share
    assert (shares - expected).abs().le(bound).all()
    assert len({tuple(row) for row in kept[2:].gt(0).tolist()}) == 4  # each path has draws of its own
    assert not torch.equal(draws[0], draws[1]) and tiny(drop_path=0.0).train().drawn_paths(alone(4), 1) is None
    assert backbone.eval().drawn_paths(alone(4), 1) is None


def test_uniform_drop_path_has_one_rate():
    assert tiny(drop_path=0.4, drop_path_uniform=True).drop_rates == [0.4] * 6
    assert tiny(drop_path=0.4).drop_rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_drop_path_without_drawn_paths_is_timms():
    """Outside a training step it draws from torch's generator, for batches of any size."""
    for count in (8, 4):
        x = torch.randn(count, 3, 5)
        torch.manual_seed(3)
        expected = TimmDropPath(0.4)(x)
        torch.manual_seed(3)
        assert torch.equal(DropPath(0.4)(x), expected)
    assert DropPath(0.4).eval()(x) is x


def test_a_network_in_training_takes_batches_of_any_size_after_a_step():
    backbone = tiny(drop_path=0.4).train()
    images = torch.randn(8, 3, 16, 16)
    backbone(images, backbone.drawn_paths(alone(8), 1).flatten(1))
    assert backbone(images[:4]).shape == (4, 24) and backbone.tokens(images).cls.shape == (8, 24)


def test_a_recomputed_block_drops_the_same_paths():
    plain, again = (tiny(drop_path=0.5, checkpointing=checkpointing).train() for checkpointing in (False, True))
    images = torch.randn(8, 3, 16, 16)
    gradients = []
    for backbone in (plain, again):
        kept = backbone.drawn_paths(alone(8), 1).flatten(1)
        gradients.append(torch.autograd.grad(backbone(images, kept).square().sum(), list(backbone.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_no_drop_path_of_timm_is_left():
    blocks = [type(part) for part in tiny(drop_path=0.3).modules()]
    assert (
        TimmDropPath not in blocks and blocks.count(DropPath) == 4
    )  # two a block, and none in the first, whose rate is 0
    post = [type(part) for part in tiny(drop_path=0.3, norm="post").modules()]
    assert TimmDropPath not in post and post.count(DropPath) == 4
    with pytest.raises(UserError, match=r"ParallelThingsBlock blocks cannot drop .*: set backbone.drop_path 0"):
        Backbone(BackboneConfig(name="vit_small_patch16_18x2_224", depth=2, drop_path=0.1))
    Backbone(BackboneConfig(name="vit_small_patch16_18x2_224", depth=2, drop_path=0.0))
