"""Backbone: sizes, tokens, attention and errors. Numbers of the official code are in tests/parity/test_backbone.py."""

from __future__ import annotations

import pytest
import torch

from vit_suite.config import BackboneConfig
from vit_suite.errors import UserError
from vit_suite.models.backbone import Backbone


def tiny(**changes) -> Backbone:
    options = {"patch_size": 4, "dim": 24, "depth": 3, "heads": 3, "image_size": [16, 16], "drop_path": 0.0}
    return Backbone(BackboneConfig(**options | changes)).eval()


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_tokens_grid_and_attention_rows(registers):
    backbone = tiny(registers=registers)
    images = torch.randn(2, 3, 16, 24)  # not square
    tokens = backbone.tokens(images, blocks=[0, -1])
    assert tokens.grid == (4, 6)
    assert tokens.cls.shape == (2, 24) and tokens.patches.shape == (2, 24, 24)
    assert len(tokens.blocks) == 2
    torch.testing.assert_close(tokens.blocks[-1][0], tokens.cls)
    torch.testing.assert_close(backbone(images), tokens.cls)
    attention = backbone.last_attention(images)
    assert attention.shape == (2, 3, 1 + registers + 24, 1 + registers + 24)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 25 + registers))


@torch.no_grad()
def test_patches_are_row_major():
    """A change in the patch at row 1, column 2 moves that patch token most when attention is cut out."""
    backbone = tiny(depth=1)
    torch.nn.init.zeros_(backbone.vit.blocks[0].attn.proj.weight)
    torch.nn.init.zeros_(backbone.vit.blocks[0].attn.proj.bias)
    images = torch.zeros(1, 3, 12, 20)
    before = backbone.tokens(images).patches
    images[:, :, 4:8, 8:12] = 1
    changed = (backbone.tokens(images).patches - before).abs().sum(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 5 + 2]


@torch.no_grad()
def test_attention_is_what_the_block_used():
    """attention @ v, put through the block's projection, is the block's own output: nothing is recomputed
    differently."""
    backbone = tiny()
    images = torch.randn(2, 3, 16, 16)
    seen = {}
    attention_module = backbone.vit.blocks[-1].attn
    attention_module.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], out=output))
    backbone.tokens(images)
    qkv = attention_module.qkv(seen["x"]).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    mixed = (backbone.last_attention(images) @ qkv[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention_module.proj(mixed), seen["out"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_224.dino"],
)
def test_timm_models_match_timm_at_their_native_size(name):
    import timm

    size = [98, 98] if "patch14" in name else [64, 64]
    backbone = Backbone(BackboneConfig(name=name, image_size=size, drop_path=0.0, depth=2)).eval()
    reference = timm.create_model(name, num_classes=0, img_size=size, depth=2).eval()
    reference.load_state_dict(backbone.vit.state_dict())
    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(backbone(images), reference.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
    patches = reference.forward_features(images)[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(backbone.tokens(images).patches, patches, atol=1e-5, rtol=1e-5)
    assert backbone.last_attention(images).shape[-1] == backbone.prefix_tokens + patches.shape[1]


def test_config_rebuilds_the_same_network():
    backbone = Backbone(BackboneConfig(name="vit_tiny_patch16_224", image_size=[32, 48], depth=2))
    again = Backbone(backbone.cfg)
    again.load_state_dict(backbone.state_dict())
    assert again.native_grid == (2, 3)


def test_one_and_five_channels():
    for channels in (1, 5):
        assert tiny(channels=channels)(torch.randn(1, channels, 16, 16)).shape == (1, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "vit_smal_patch16_224"}, ["vit_smal_patch16_224", "vit_small_patch16_224"]),
        ({"name": "resnet18"}, ["resnet18"]),
        ({"name": "vit_base_patch16_siglip_224"}, ["CLS"]),
        ({"patch_size": 16, "image_size": [40, 40]}, ["40x40", "16", "32 and 48"]),
        ({"patch_size": 16, "image_size": [8, 8]}, ["smaller than a patch"]),
        ({"dim": 100, "heads": 3}, ["100", "3"]),
        ({"name": "vit_tiny_patch16_224", "heads": 5}, ["vit_tiny_patch16_224", "cannot be built"]),
        ({"name": "deit_tiny_distilled_patch16_224"}, ["distill"]),
    ],
)
def test_bad_backbones_say_what_is_wrong(options, words):
    with pytest.raises(UserError) as error:
        Backbone(BackboneConfig(**options))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("causal", [False, True])
def test_checkpointing_changes_memory_and_nothing_else(causal):
    """Drop path included: a block that is computed again draws what it drew before."""

    def run(checkpointing: bool):
        torch.manual_seed(0)
        backbone = tiny(checkpointing=checkpointing, drop_path=0.5, causal=causal, registers=1).train()
        images = torch.randn(8, 3, 16, 16)
        kept: dict[int, int] = {}  # a tensor that two operations save is counted once

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = backbone.tokens(images, blocks=[1])
            size = sum(kept.values())
            (
                tokens.cls.square().sum()
                + tokens.patches.sum()
                + tokens.blocks[0][0].sum()
                + backbone(images).square().sum()
            ).backward()
        attention = backbone.last_attention(images)
        return size, [p.grad for p in backbone.parameters()], [tokens.cls, tokens.patches, attention], torch.rand(1)

    plain, lean = run(False), run(True)
    assert lean[0] < plain[0] / 3
    for one, two in zip(plain[1] + plain[2] + [plain[3]], lean[1] + lean[2] + [lean[3]], strict=True):
        assert torch.equal(one, two)


def test_wrong_image_size_at_the_call():
    with pytest.raises(UserError, match="not divisible by the patch size 4"):
        tiny()(torch.randn(1, 3, 18, 16))


def test_pixels_are_refused_in_words():
    with pytest.raises(UserError, match="takes normalized float images, got torch.uint8: .*transform"):
        tiny()(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
