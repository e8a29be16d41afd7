"""Attention with a backward pass of its own, and a last block that answers for the CLS token alone."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention

from tests.models.test_backbone import tiny
from vit_suite.config import BackboneConfig
from vit_suite.models.backbone import Backbone, last
from vit_suite.models.blocks import Attention, PlainAttention, replace_attention


def softmax_attention(qkv: torch.Tensor, heads: int, scale: float) -> torch.Tensor:
    """What `PlainAttention` is, left to autograd."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return ((scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("tokens", [17, 40])  # shorter and longer than a vector
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
def test_the_gradient_by_hand_is_autograds(tokens, dtype, tolerance):
    qkv = torch.randn(3, tokens, 36, dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, tokens, 12, dtype=dtype)
    found, expected = PlainAttention.apply(qkv, 2, 0.7), softmax_attention(qkv, 2, 0.7)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, qkv, gradient)[0] for out in (found, expected)), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(("tokens", "plain"), [(17, True), (65, False)])  # fp32
def test_blocks_use_it_off_the_fused_kernel_for_short_sequences(monkeypatch, tokens, plain):
    attention, x, calls = tiny().vit.blocks[0].attn, torch.randn(2, tokens, 24), []
    attention.fused_attn = True
    expected = attention(x)
    by_hand = PlainAttention.forward
    monkeypatch.setattr(
        PlainAttention, "forward", lambda ctx, qkv, *rest: calls.append(qkv.shape[1]) or by_hand(ctx, qkv, *rest)
    )
    attention.fused_attn = False
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
def test_the_last_block_for_cls_alone_gives_cls_and_all_gradients(options, fused):
    backbone = tiny(**options).train()
    backbone.set_fused_attention(fused)
    images = torch.randn(4, 3, 16, 16)
    results = []
    for whole in (False, True):
        torch.manual_seed(1)  # of the drop path
        cls = backbone.pooled(last(backbone.blocks(backbone.embed(images)[0]), images)) if whole else backbone(images)
        gradients = torch.autograd.grad(cls.square().sum(), list(backbone.parameters()))
        results.append([cls, *gradients])
    torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


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


def test_variants_of_attention_stay_timms():
    vit = tiny().vit
    for block in vit.blocks:
        block.attn.__class__ = TimmAttention
    vit.blocks[0].attn.norm = torch.nn.LayerNorm(24)
    replace_attention(vit)
    assert [type(block.attn) for block in vit.blocks] == [TimmAttention, Attention, Attention]
