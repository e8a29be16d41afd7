"""Which parameters decay, at which rate they learn, and how their gradients are clipped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vit_suite.config import BackboneConfig, OptimConfig, SiTOptimConfig, SupervisedOptimConfig
from vit_suite.methods.base import Method
from vit_suite.models.backbone import Backbone
from vit_suite.models.heads import DINOHead
from vit_suite.optim.groups import clip_networks, layer_of, parameter_groups
from vit_suite.optim.schedules import peak_rate


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


def networks() -> nn.ModuleDict:
    """Student of a self-distillation: backbone, mask token and two heads."""
    backbone = Backbone(BackboneConfig(patch_size=4, dim=24, depth=2, heads=3, image_size=[16, 16]))
    student = nn.ModuleDict({"backbone": backbone, "head": DINOHead(24, 8, 12, 6), "ibot_head": DINOHead(24, 8, 12, 6)})
    student.mask_token = nn.Parameter(torch.zeros(1, 24))
    return student


def test_patch_embedding_and_last_layers_have_rates_of_their_own():
    student = networks()
    groups = parameter_groups(student, 0.9, patch_embed_lr=0.2, last_layer_apart=True)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    named = {name: found[id(parameter)] for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert named["backbone.vit.patch_embed.proj.weight"]["lr_scale"] == pytest.approx(0.9**3 * 0.2)
    assert named["backbone.vit.pos_embed"]["lr_scale"] == named["mask_token"]["lr_scale"] == pytest.approx(0.9**3)
    assert named["backbone.vit.blocks.0.attn.qkv.weight"]["lr_scale"] == pytest.approx(0.9**2)
    assert named["backbone.vit.norm.weight"]["lr_scale"] == named["head.mlp.0.weight"]["lr_scale"] == 1
    assert {name for name, group in named.items() if group["last_layer"]} == {
        "head.last_layer.weight_v",
        "ibot_head.last_layer.weight_v",
    }
    assert named["mask_token"]["decay"] and not named["backbone.vit.patch_embed.proj.bias"]["decay"]
    assert [set(group) for group in parameter_groups(student)] == [
        {"params", "decay", "lr_scale"},
        {"params", "decay", "lr_scale", "weight_decay"},
    ]  # nobody asked: DINO's two groups


def test_networks_are_clipped_each_by_its_own_norm():
    student = networks()
    for name, parameter in student.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.0 if name.startswith("ibot_head") else 1.0)
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    sizes = {
        part: sum(g.numel() for name, g in gradients.items() if name.startswith(part)) for part in ("backbone", "head")
    }
    norms = clip_networks(gradients, 3.0)
    assert float(norms["backbone"]) == pytest.approx((sizes["backbone"] + 24) ** 0.5)  # with the mask token
    assert float(norms["head"]) == pytest.approx(sizes["head"] ** 0.5)
    for part in ("backbone", "head"):
        clipped = [
            g for name, g in gradients.items() if name.startswith((part, "mask_token") if part == "backbone" else part)
        ]
        assert float(torch.stack([g.norm() for g in clipped]).norm()) == pytest.approx(3.0, rel=1e-5)
    assert not any(g.any() for name, g in gradients.items() if name.startswith("ibot_head"))


def test_the_peak_rate_follows_the_batch():
    assert peak_rate(5e-4, 1024, "linear") == pytest.approx(2e-3)
    assert peak_rate(4e-3, 1024, "sqrt") == pytest.approx(4e-3)
    assert peak_rate(4e-3, 256, "sqrt") == pytest.approx(2e-3)


def test_first_moment_in_bf16_is_optaxs():
    """Two steps of one parameter: the update takes the fp32 moment, and what is kept of it has 8 bits."""
    gradients = torch.tensor([0.3, 0.7, -1.1]), torch.tensor([1.3, -0.2, 0.9])
    kept, after = {}, {}
    for precision in ("fp32", "bf16"):
        weight = nn.Parameter(torch.ones(3))
        optim = OptimConfig(lr=0.1, weight_decay=0.0, first_moment=precision)
        optimizer = Method.adamw(SimpleNamespace(optim=optim), [{"params": [weight]}])
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        kept[precision], after[precision] = optimizer.state[weight]["exp_avg"], weight.detach()
    first = (0.1 * gradients[0]).bfloat16().float()
    moment = 0.9 * first + 0.1 * gradients[1]
    second = 0.999 * 0.001 * gradients[0] ** 2 + 0.001 * gradients[1] ** 2
    update = (moment / (1 - 0.9**2)) / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
    expected = 1 - 0.1 * gradients[0].sign() - 0.1 * update
    torch.testing.assert_close(after["bf16"], expected, atol=1e-6, rtol=0)
    assert torch.equal(kept["bf16"], moment.bfloat16().float()) and not torch.equal(kept["fp32"], kept["bf16"])
    assert not torch.equal(after["fp32"], after["bf16"])


def test_a_decoder_is_a_head():
    assert layer_of("decoder.blocks.0.attn.qkv.weight", 4) == layer_of("decoder.mask_token", 4) == 5
    assert layer_of("backbone.vit.blocks.3.attn.qkv.weight", 4) == 4 and layer_of("backbone.mask_token", 4) == 0
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    module["decoder"] = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    scales = {group["lr_scale"]: len(group["params"]) for group in parameter_groups(module, layer_decay=0.5)}
    assert set(scales) == {0.5, 1.0}, "one layer of the encoder, and heads at the full rate"
