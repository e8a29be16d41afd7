"""SiT against its official code: tokens, heads, reconstruction, NT-Xent, learned weights with gradients, rotation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vit_suite.config import BackboneConfig, SiTConfig, SiTViewsConfig
from vit_suite.losses.contrastive import nt_xent_logits
from vit_suite.losses.reconstruction import reconstruction_l1
from vit_suite.losses.uncertainty import uncertainty_sum
from vit_suite.methods.sit import TASKS, Outputs, SiT
from vit_suite.views.corruption import Corrupted
from vit_suite.views.rotate import rotate

from .golden import largest_error, load_golden, record, with_prefix


@pytest.fixture(scope="module")
def golden():
    return load_golden("sit_v1")


def swapped(position: torch.Tensor) -> torch.Tensor:
    """The first two rows exchanged: ours are contrastive, rotation; the official ones rotation, contrastive."""
    return torch.cat([position[:, [1, 0]], position[:, 2:]], dim=1)


def build(hyper: dict, tensors: dict) -> SiT:
    """Our SiT with the fixture's weights, every one of which must find its place."""
    backbone = BackboneConfig(
        patch_size=hyper["patch"],
        dim=hyper["dim"],
        depth=hyper["depth"],
        heads=hyper["heads"],
        mlp_ratio=hyper["mlp_ratio"],
        drop_path=0.0,
    )
    width = tensors["state.contrastive_head.weight"].shape[0]
    module = SiT(SiTConfig(contrastive_dim=width), backbone, SiTViewsConfig(global_size=hyper["img"]))
    state = with_prefix(tensors, "state.")
    heads = {
        "student.rotation_head.weight": state.pop("rot_head.weight"),
        "student.rotation_head.bias": state.pop("rot_head.bias"),
        "student.contrastive_head.mlp.0.weight": state.pop("contrastive_head.weight"),
        "student.contrastive_head.mlp.0.bias": state.pop("contrastive_head.bias"),
        "student.decoder.conv.weight": state.pop("convTrans.weight"),
        "student.decoder.conv.bias": state.pop("convTrans.bias"),
        "log_variances": torch.cat([state.pop(name) for name in ("rot_w", "contrastive_w", "recons_w")]),
    }
    state |= {
        "cls_token": state.pop("contrastive_token"),
        "reg_token": state.pop("rot_token"),
        "pos_embed": swapped(state["pos_embed"]),
    }
    module.load_state_dict({f"student.backbone.vit.{name}": tensor for name, tensor in state.items()} | heads)
    return module.eval()


def outputs(module: SiT, tensors: dict) -> tuple[Outputs, torch.Tensor, torch.Tensor, Corrupted]:
    """What the network says of both views, the clean views (2, B, C, S, S), their turns, and that every pixel
    counts."""
    images = torch.stack([tensors["x1_in"], tensors["x2_in"]])
    clean = torch.stack([tensors["x1"], tensors["x2"]])
    turns = torch.stack([tensors["rots1"], tensors["rots2"]])
    changed = torch.ones(clean.shape[:2] + clean.shape[-2:], dtype=torch.bool)
    return module.student(images.flatten(0, 1)), clean, turns, Corrupted(images, changed, None)


@torch.no_grad()
def test_network(golden):
    hyper, tensors = golden
    module = build(hyper, tensors)
    tokens = module.student.backbone.tokens(tensors["x1_in"])
    ours = torch.cat([tokens.registers, tokens.cls.unsqueeze(1), tokens.patches], dim=1)
    record("sit_v1", "tokens", largest_error(ours, tensors["features1"]), 1e-5)
    said, *_ = outputs(module, tensors)
    for what, value in (("rot_logits", said.turns), ("contrastive", said.embedding), ("recon", said.pixels)):
        theirs = torch.cat([tensors[f"{what}1"], tensors[f"{what}2"]])
        record("sit_v1", what, largest_error(value, theirs), 1e-5)


@torch.no_grad()
def test_fine_tuned_heads(golden):
    """Two linear classifiers on the two tokens, as SiT evaluates."""
    hyper, tensors = golden
    tokens = build(hyper, tensors).student.backbone.tokens(tensors["x1_in"])
    head = with_prefix(tensors, "finetune.state.")
    for name, token in (("rot", tokens.registers[:, 0]), ("contrastive", tokens.cls)):
        ours = F.linear(token, head[f"{name}_head.weight"], head[f"{name}_head.bias"])
        record("sit_v1", f"fine-tuned {name} logits", largest_error(ours, tensors[f"finetune.{name}_logits"]), 1e-5)


def test_nt_xent(golden):
    _, tensors = golden
    first, second = tensors["nt.emb_i"].clone().requires_grad_(), tensors["nt.emb_j"].clone().requires_grad_()
    loss = F.cross_entropy(*nt_xent_logits(first, second, first, second, 0.5))
    loss.backward()
    record("sit_v1", "NT-Xent", largest_error(loss, tensors["nt.loss"]), 1e-6)
    errors = [largest_error(view.grad, tensors[name]) for view, name in ((first, "nt.grad_i"), (second, "nt.grad_j"))]
    record("sit_v1", "NT-Xent gradient", max(errors), 1e-6)


@pytest.mark.parametrize("form", ["apr", "jul"])
def test_losses_and_gradients(golden, form):
    hyper, tensors = golden
    module = build(hyper, tensors)
    said, clean, turns, corrupted = outputs(module, tensors)
    values, _ = module.task_losses(said, clean, turns, corrupted)
    for task, theirs in (("rotation", "rot_ce"), ("contrastive", "contrastive"), ("reconstruction", "l1")):
        record("sit_v1", f"{task} loss", largest_error(values[task], tensors[f"mtl.{theirs}"]), 1e-6)
    with torch.no_grad():
        module.log_variances.copy_(torch.tensor(hyper["s"]))
    losses = torch.stack([values[task] for task in TASKS])
    total = uncertainty_sum(losses, module.log_variances, module.factors, {"apr": "april", "jul": "july"}[form])
    record("sit_v1", f"{form} total", largest_error(total, tensors[f"mtl.{form}.total"].squeeze()), 3e-6)
    total.backward()
    record(
        "sit_v1", f"{form} gradient of s", largest_error(module.log_variances.grad, tensors[f"mtl.{form}.grad_s"]), 1e-6
    )
    vit = module.student.backbone.vit
    ours = {
        "rot_token": vit.reg_token.grad,
        "contrastive_token": vit.cls_token.grad,
        "pos_embed": swapped(vit.pos_embed.grad),
        "convTrans.weight": module.student.decoder.conv.weight.grad,
        "blocks.0.attn.qkv.weight": vit.blocks[0].attn.qkv.weight.grad,
    }
    theirs = with_prefix(tensors, f"mtl.{form}.grad.")
    assert ours.keys() == theirs.keys()
    record("sit_v1", f"{form} gradients", max(largest_error(ours[name], theirs[name]) for name in theirs), 1e-6)


def test_l1_without_a_mask_is_over_all_pixels(golden):
    _, tensors = golden
    ours = reconstruction_l1(
        torch.stack([tensors["recon1"], tensors["recon2"]]), torch.stack([tensors["x1"], tensors["x2"]])
    )
    record("sit_v1", "L1 over all pixels", largest_error(ours, tensors["mtl.l1"]), 1e-6)


@pytest.mark.parametrize("label", range(4))
def test_rotation(golden, label):
    """July's turns are ours; April's 1 and 3 are each other's."""
    _, tensors = golden
    image = tensors["rot.image"].unsqueeze(0)
    turned = rotate(image, torch.tensor([label]))[0]
    record("sit_v1", "rotation, July", largest_error(turned, tensors[f"rot.jul.label{label}"]), 0)
    record("sit_v1", "rotation, April", largest_error(turned, tensors[f"rot.apr.label{-label % 4}"]), 0)
