"""Attention with a backward pass of its own, and a last block that answers for the CLS token alone."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention

from tests.models.test_backbone import tiny
from vit_suite.config import BackboneConfig
from vit_suite.models import blocks
from vit_suite.models.backbone import Backbone, last
from vit_suite.models.blocks import Attention, PlainAttention, answers_first
from vit_suite.views.draw import alone


def softmax_attention(qkv: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """What `PlainAttention` is, left to autograd."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return ((scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens", [17, 40])  # shorter and longer than a vector
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_by_hand_is_autograds(tokens, dtype):
    """Against autograd in float64 on the same numbers. How kernels round, and in which order they add, depends on the
    processor; so the bound is on the error relative to the largest value: 16 roundings of the type, since no value
    passes more than four products, one softmax and their roundings in sums that partly cancel."""
    qkv = torch.randn(3, tokens, 36, dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, tokens, 12, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    found, expected = PlainAttention.apply(qkv, 2, 0.7), softmax_attention(exact, 2, 0.7)
    pairs = [(found, expected)]
    pairs += [
        (torch.autograd.grad(found, qkv, gradient)[0], torch.autograd.grad(expected, exact, gradient.double())[0])
    ]
    for ours, theirs in pairs:
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("tokens", "plain"), [(17, True), (65, False)])  # fp32
def test_blocks_use_it_off_the_fused_kernel_for_short_sequences(monkeypatch, tokens, plain):
    attention, x, calls = tiny().vit.blocks[0].attn, torch.randn(2, tokens, 24), []
    expected = TimmAttention.forward(attention, x)
    by_hand = PlainAttention.forward
    monkeypatch.setattr(
        PlainAttention, "forward", lambda ctx, qkv, *rest: calls.append(qkv.shape[1]) or by_hand(ctx, qkv, *rest)
    )
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)
    assert calls == [tokens] * plain


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"registers": 2},
        {"norm": "post"},
        {"causal": True},
        {"drop_path": 0.5},
        {"depth": 1},
        {"checkpointing": True},
    ],
    ids=str,
)
def test_the_last_block_for_cls_alone_gives_cls_and_all_gradients(options, fused, monkeypatch):
    """In float64: the two ways round differently, by an amount that depends on the processor's kernels."""
    monkeypatch.setattr(blocks, "PLAIN", {} if fused else {torch.float64: 64})
    backbone = tiny(**options).double().train()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    kept = backbone.drawn_paths(alone(4), 1)
    kept = None if kept is None else kept.flatten(1).double()
    results = []
    for whole in (False, True):
        x, grid = backbone.embed(images)
        cls = backbone.pooled(last(backbone.blocks(x, grid, kept), x)) if whole else backbone(images, kept)
        gradients = torch.autograd.grad(cls.square().sum(), list(backbone.parameters()))
        results.append([cls, *gradients])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_layer_scale_and_norms_of_q_and_k(name):
    patch = 14 if "patch14" in name else 16
    backbone = Backbone(BackboneConfig(name=name, image_size=[4 * patch] * 2, drop_path=0.0, depth=2)).eval()
    for block in backbone.vit.blocks:
        block.attn.q_norm, block.attn.k_norm = torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)
    for parameter in backbone.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # layer scale starts at almost nothing
    images = torch.randn(2, 3, 4 * patch, 4 * patch)
    torch.testing.assert_close(backbone(images), backbone.tokens(images).cls, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_last_block_works_out_the_cls_token_alone():
    backbone, seen = tiny(), {}
    for index, block in enumerate(backbone.vit.blocks):
        block.mlp.register_forward_hook(
            lambda module, inputs, output, index=index: seen.update({index: tuple(output.shape)})
        )
    backbone(torch.randn(2, 3, 16, 16))
    assert seen == {0: (2, 17, 24), 1: (2, 17, 24), 2: (2, 1, 24)}
    tiny_mean = tiny(pool="mean")
    tiny_mean.vit.blocks[-1].mlp.register_forward_hook(
        lambda module, inputs, output: seen.update(mean=tuple(output.shape))
    )
    tiny_mean(torch.randn(2, 3, 16, 16))
    assert seen["mean"] == (2, 17, 24)


@torch.no_grad()
def test_variants_of_attention_stay_timms():
    """Norms and gates of the output run as timm runs them, and the last block is then computed whole."""
    backbone, x = tiny(), torch.randn(2, 17, 24)
    attention = backbone.vit.blocks[-1].attn
    assert type(attention) is Attention and answers_first(backbone.vit.blocks[-1])
    attention.norm = torch.nn.LayerNorm(24)
    torch.testing.assert_close(attention(x), TimmAttention.forward(attention, x), rtol=0, atol=0)
    assert not answers_first(backbone.vit.blocks[-1])
    differential = Backbone(BackboneConfig(name="vit_dlittle_patch16_reg1_gap_256", depth=1, drop_path=0, pool="mean"))
    assert type(differential.vit.blocks[0].attn).__name__ == "DiffAttention"
